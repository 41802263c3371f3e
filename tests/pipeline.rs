//! The pipeline example, run as a program: what it prints, and what it says to wrong input.

mod common;

use std::path::Path;
use std::process::{Command, Output};

/// The tutorial's figures, and how far the default run may lie from them.
const LOSSES: [f64; 5] = [1.20, 0.95, 0.80, 0.70, 0.62];
const ACCURACIES: [f64; 5] = [0.55, 0.65, 0.72, 0.78, 0.82];
const LOSS_TOLERANCE: f64 = 0.10;
const ACCURACY_TOLERANCE: f64 = 0.06;

type TestResult = Result<(), Box<dyn std::error::Error>>;

fn run(arguments: &[&str]) -> Output {
    let output = Command::new(common::example("pipeline")).args(arguments).output();
    output.expect("`cargo test` builds the example, `cargo test --test pipeline` alone does not")
}

fn printed(arguments: &[&str]) -> String {
    let output = run(arguments);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {complaint}");
    String::from_utf8(output.stdout).expect("the example prints UTF-8")
}

/// Runs the example on a file of this text.
fn run_on(text: impl AsRef<[u8]>) -> Result<Output, std::io::Error> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("rows.csv");
    std::fs::write(&file, text)?;
    Ok(run(&["--data", path(&file)]))
}

fn path(file: &Path) -> &str {
    file.to_str().expect("a temporary path is UTF-8")
}

/// The losses and the accuracies of the training trace.
fn trace(printed: &str) -> (Vec<f64>, Vec<f64>) {
    let rows = printed.lines().skip_while(|line| !line.contains("epoch |"));
    let rows = rows.skip(1).take_while(|line| line.contains(" | "));
    let figure = |text: &str| text.trim().parse::<f64>().expect("a figure");
    rows.map(|line| {
        let cells: Vec<&str> = line.split('|').collect();
        (figure(cells[1]), figure(cells[2]))
    })
    .unzip()
}

fn assert_near(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: {found:?}");
    for (found_one, expected_one) in found.iter().zip(expected) {
        let distance = (found_one - expected_one).abs();
        assert!(distance <= tolerance, "{what}: {found:?}, expected {expected:?}");
    }
}

#[test]
fn the_default_run_shows_every_stage() {
    let printed = printed(&[]);
    let mut rest = printed.as_str();
    for text in [
        "Raw data input",
        "1000 rows x 10 columns",
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
        "Training trace",
        "test rows",
        "*",
        "Prediction trace",
        "layer 1, 10 values, input",
        "layer 2, 64 values, ReLU",
        "layer 3, 64 values, ReLU",
        "layer 4, 3 values, output",
        "softmax",
        "smoothed label",
        "loss of this row",
        "Key insight, measured",
        "accuracy",
        "mean top probability",
        "expected calibration error",
        "Smoothing made",
    ] {
        let position = rest.find(text);
        let position = position.unwrap_or_else(|| panic!("no {text:?} in its place:\n{printed}"));
        rest = &rest[position + text.len()..];
    }
    let (losses, accuracies) = trace(&printed);
    assert_near("loss", &losses, &LOSSES, LOSS_TOLERANCE);
    assert_near("accuracy", &accuracies, &ACCURACIES, ACCURACY_TOLERANCE);
}

#[test]
fn every_seed_learns_in_every_epoch() {
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
fn a_seed_fixes_every_figure() -> TestResult {
    let first = printed(&["--seed", "3"]);
    assert_eq!(first, printed(&["--seed", "3"]));
    assert_ne!(first, printed(&["--seed", "4"]));
    let mut alone = Command::new(common::example("pipeline"));
    let alone = alone.args(["--seed", "3"]).env("RAYON_NUM_THREADS", "1").output()?;
    assert_eq!(first.as_bytes(), alone.stdout);
    Ok(())
}

#[test]
fn options_change_what_they_name() {
    let all = printed(&["--convention", "all", "--epochs", "1"]);
    assert!(all.contains("soft label [0.033333335, 0.93333334, 0.033333335]"), "{all}");
    let none = printed(&["--convention", "none", "--epochs", "2"]);
    assert!(none.contains("Smoothing made the model as sure and as calibrated"), "{none}");
    let deep = printed(&["--hidden", "8,7,6", "--epochs", "2", "--batch-size", "999"]);
    assert!(
        deep.contains("layer 4, 6 values, ReLU") && deep.contains("layer 5, 3 values, output"),
        "{deep}"
    );
    let help = printed(&["--help"]);
    for option in
        ["data", "epsilon", "convention", "epochs", "batch-size", "lr", "hidden", "seed", "device"]
    {
        assert!(help.contains(&format!("--{option} ")), "{help}");
    }
}

#[test]
fn wrong_options_get_a_message() {
    for (option, value, message) in [
        ("--epsilon", "1.5", "epsilon is 1.5"),
        ("--epsilon", "-1", "epsilon is -1"),
        ("--epsilon", "NaN", "epsilon is NaN"),
        ("--epochs", "0", "epochs"),
        ("--batch-size", "0", "batch-size"),
        ("--hidden", "32,0", "hidden"),
        ("--hidden", "", "hidden"),
        ("--lr", "0", "--lr is 0"),
        ("--lr", "inf", "--lr is inf"),
        ("--lr", "1e30", "too large"),
        ("--seed", "-1", "seed"),
        ("--convention", "some", "others, all, none"),
        ("--device", "abacus", "cpu, cuda, metal"),
        ("--data", "no/such/file.csv", "no/such/file.csv"),
    ] {
        assert_fails(&run(&[option, value]), message);
    }
}

fn assert_fails(output: &Output, message: &str) {
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "no failure, expected {message:?}");
    assert!(complaint.contains(message), "{complaint}, expected {message:?}");
    assert!(!complaint.contains("panicked"), "{complaint}");
}

#[test]
fn a_wrong_file_is_told_line_and_column() -> TestResult {
    let good = "1,2,a\n3,4,b\n5,6,a\n7,8,b\n9,10,a\n";
    assert!(run_on(good)?.status.success());
    for (text, message) in [
        ("", "line 1, column 1: the file is empty"),
        ("1\n2\n", "line 1, column 1: expected numbers"),
        ("x,y,label\n", "line 1, column 1: expected more than one row"),
        ("1,2,a\n3,4\n5,6,a\n", "line 2, column 3: 2 columns"),
        ("1,2,a\n3,4,b,c\n5,6,a\n", "line 2, column 4: 4 columns"),
        ("x,y,label\n1,2,a\n3,,b\n", "line 3, column 2: the field is empty"),
        ("1,2,a\n3,4,\n", "line 2, column 3: the field is empty"),
        ("1,2,a\n3,four,b\n", "line 2, column 2: \"four\" is not"),
        ("one,2,a\n3,4,b\n", "line 1, column 1: \"one\" is not"),
        ("1,2,a\n\n\nNaN,4,b\n", "line 4, column 1: \"NaN\" is not"),
        ("1,2,a\r\n\r\n3,-inf,b\r\n", "line 3, column 2: \"-inf\" is not"),
        ("1,2,a\n3,1e39,b\n", "line 2, column 2: \"1e39\" is not"),
        ("1,2,a\n3,4,a\n5,6,a\n7,8,a\n9,9,a\n", "line 5, column 3: one class"),
        ("1,2,a\n3,4,b\n5,6,a\n7,8,b\n", "line 4, column 3: 4 rows"),
        ("1,2,1.5\n3,4,1.7\n5,6,2\n7,8,3\n9,9,4\n", "line 5, column 3: 5 labels"),
        (
            "6,2,no,yes\n1,2,0\n3,4,1\n5,6,2\n7,8,1\n9,9,0\n1,1,1\n",
            "line 4, column 3: no class \"2\"",
        ),
    ] {
        assert_fails(&run_on(text)?, message);
    }
    assert_fails(&run_on(b"1,2,a\n3,\xff,b\n")?, "line 2, column 2: the text is not UTF-8");
    assert_fails(&run(&["--data", path(&std::env::temp_dir())]), "cannot use");
    Ok(())
}

#[test]
fn labels_may_be_words_or_numbers_with_or_without_a_header() -> TestResult {
    let rows = |labels: [&str; 2]| -> String {
        let row = |i: usize| format!("{}, {},{}\n", i % 2, i as f64 / 7., labels[i % 2]);
        (0..50).map(row).collect()
    };
    for (header, labels, classes) in [
        ("\u{feff}width, height ,kind\r\n", ["pear", "apple"], "0 = apple, 1 = pear"),
        ("", ["10", "9"], "0 = 9, 1 = 10"),
        ("50,2,no,yes\n", ["1", "0"], "0 = no, 1 = yes"),
        ("\n\n", ["\"a, b\"", "é"], "0 = a, b, 1 = é"),
    ] {
        let output = run_on(format!("{header}{}", rows(labels)))?;
        let printed = String::from_utf8(output.stdout)?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{header:?}: {complaint}");
        assert!(printed.contains("50 rows x 2 columns, 2 classes"), "{printed}");
        assert!(printed.contains(classes), "{printed}");
        assert!(printed.contains("training 40 x 2"), "{printed}");
    }
    Ok(())
}
