//! The `pipeline` example, run as a program: printed output and error messages.

mod common;

use common::program::{self, TestResult, assert_near, figures, trace};

/// Losses and accuracies in the tutorial, and the allowed distance of the default run.
const LOSSES: [f64; 5] = [1.20, 0.95, 0.80, 0.70, 0.62];
const ACCURACIES: [f64; 5] = [0.55, 0.65, 0.72, 0.78, 0.82];
const LOSS_TOLERANCE: f64 = 0.10;
const ACCURACY_TOLERANCE: f64 = 0.06;

fn printed(arguments: &[&str]) -> String {
    program::printed("pipeline", arguments)
}

#[test]
fn default_run_prints_every_stage() {
    let printed = printed(&[]);
    let texts = [
        "Raw data input",
        "1000 rows x 10 columns",
        "3 classes",
        "[5.1, 3.5, 1.4, ",
        ", 0.2]",
        "Train/test split",
        "800 x 10",
        "200 x 10",
        "Label smoothing applied",
        "800 x 3",
        "class 1",
        "[0, 1, 0]",
        "[0.05, 0.9, 0.05]",
        "Model training",
        "[10, 64, 64, 3]",
        "Training trace",
        "epoch |   loss | accuracy",
        "epoch | loss",
        "*",
        "Prediction trace",
        "test row",
        "layer 1, 10 values, input",
        "layer 2, 64 values, ReLU",
        "layer 3, 64 values, ReLU",
        "layer 4, 3 values, output",
        "softmax",
        "smoothed label",
        "predicted class",
        "loss of this row",
        "Key insight, measured",
        "on the test rows",
        "accuracy",
        "mean top probability",
        "smoothed",
        "not smoothed",
    ];
    program::assert_in_order(&printed, &texts);
    let (losses, accuracies) = trace(&printed);
    assert_near("loss", &losses, &LOSSES, LOSS_TOLERANCE);
    assert_near("accuracy", &accuracies, &ACCURACIES, ACCURACY_TOLERANCE);
    // Lines: smoothed, not smoothed. Columns: accuracy, mean top probability.
    let figures = figures(&printed);
    assert_eq!(figures.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2], "{printed}");
    assert!(figures[1][1] > figures[0][1], "{printed}");
}

#[test]
fn loss_falls_and_accuracy_rises_in_every_epoch() {
    let (mut losses, mut accuracies) = (vec![Vec::new(); 5], vec![Vec::new(); 5]);
    for seed in 0..10 {
        let (loss, accuracy) = trace(&printed(&["--seed", &seed.to_string()]));
        assert_eq!(loss.len(), 5);
        let falls = loss.is_sorted_by(|a, b| a > b);
        let rises = accuracy.is_sorted_by(|a, b| a < b);
        assert!(falls && rises, "seed {seed}: {loss:?}, {accuracy:?}");
        for epoch in 0..5 {
            losses[epoch].push(loss[epoch]);
            accuracies[epoch].push(accuracy[epoch]);
        }
    }
    let median = |mut figures: Vec<f64>| {
        figures.sort_by(f64::total_cmp);
        (figures[4] + figures[5]) / 2.
    };
    let losses: Vec<f64> = losses.into_iter().map(median).collect();
    let accuracies: Vec<f64> = accuracies.into_iter().map(median).collect();
    assert_near("median loss", &losses, &LOSSES, 2. * LOSS_TOLERANCE);
    assert_near("median accuracy", &accuracies, &ACCURACIES, 2. * ACCURACY_TOLERANCE);
}

#[test]
fn output_depends_on_the_seed_alone() -> TestResult {
    program::assert_depends_on_the_seed_alone("pipeline", &[])
}

#[test]
fn options_change_the_output() {
    let all = printed(&["--convention", "all", "--epochs", "1"]);
    assert!(all.contains("soft label [0.033333335, 0.93333334, 0.033333335]"), "{all}");
    let others = printed(&["--epsilon", "0.2", "--epochs", "1"]);
    assert!(others.contains("soft label [0.1, 0.8, 0.1]"), "{others}");
    let none = printed(&["--convention", "none", "--epochs", "2"]);
    assert!(none.contains("soft label [0.0, 1.0, 0.0]"), "{none}");
    assert_eq!(trace(&none).0.len(), 2);
    // Without smoothing, the two networks are the same.
    let figures = figures(&none);
    assert_eq!(figures[0], figures[1], "{none}");
    program::assert_options("pipeline", &["seed", "epsilon", "convention", "epochs", "device"]);
}

#[test]
fn invalid_options_are_rejected_with_a_message() {
    let cases =
        [("--convention", "some", "others, all, none"), ("--device", "abacus", "cpu, cuda, metal")];
    program::assert_rejects("pipeline", &cases);
}

#[test]
fn closed_stdout_is_no_error() -> TestResult {
    program::assert_accepts_closed_stdout("pipeline", &[])
}
