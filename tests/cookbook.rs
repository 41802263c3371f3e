//! The programs of the guide `cookbook`, run in a short version: each learns, and rejects wrong options.

mod common;

use common::program::{assert_fails, printed, run};

/// The numbers that follow `name` in the output, one for each place.
fn numbers(printed: &str, name: &str) -> Vec<f64> {
    let texts = printed.split(name).skip(1).map(|rest| {
        let number = |c: char| c.is_ascii_digit() || c == '.';
        rest.trim_start().split(|c| !number(c)).next().unwrap_or_default()
    });
    texts.filter_map(|text| text.trim_end_matches('.').parse().ok()).collect()
}

/// Checks that the losses fall from the first to the last by a factor of at most `factor`.
fn assert_falls(losses: &[f64], factor: f64, printed: &str) {
    let [first, .., last] = losses else { panic!("fewer than two losses:\n{printed}") };
    assert!(last < &(factor * first), "{losses:?}:\n{printed}");
}

#[test]
fn image_classifier_learns_and_smoothing_lowers_the_confidence() {
    let printed = printed("image_classifier", &["--epochs", "3"]);
    let (smoothed, plain) = printed.split_once("without").expect("two trainings");
    let mut confidences = Vec::new();
    for printed in [smoothed, plain] {
        let losses = numbers(printed, "loss");
        assert_eq!(losses.len(), 3, "{printed}");
        assert_falls(&losses, 0.7, printed);
        let (_, held_out) = printed.split_once("held out: ").expect("held-out digits");
        let accuracy = numbers(held_out, "accuracy");
        assert!(accuracy[0] > 0.4, "chance is 0.1:\n{printed}");
        confidences.push(numbers(held_out, "confidence")[0]);
    }
    assert!(confidences[0] < confidences[1], "{printed}");
}

#[test]
fn causal_lm_learns_and_answers() {
    let printed = printed("causal_lm", &["--steps", "80"]);
    assert_falls(&numbers(&printed, "loss"), 0.8, &printed);
    let perplexities = numbers(&printed, "perplexity");
    assert_eq!(perplexities.len(), 5, "{printed}");
    // A uniform guess among twelve tokens has perplexity 12. Smoothed targets allow no less than 1.1.
    assert_falls(&perplexities, 0.6, &printed);
    assert!(perplexities[4] > 1.05 && perplexities[4] < 3.5, "{printed}");
    let accuracies = numbers(&printed, "accuracy");
    assert!(accuracies[4] > 0.5, "chance is 0.1:\n{printed}");
    let answers = || printed.lines().filter(|line| line.contains('>'));
    assert_eq!(answers().count(), 5, "{printed}");
    for line in answers() {
        let (prompt, rest) = line.split_once('>').expect("a prompt");
        let (answer, verdict) = rest.split_once(' ').expect("a verdict");
        let answer = answer.trim_end_matches('.');
        let mut sorted: Vec<char> = prompt.chars().collect();
        sorted.sort_unstable();
        let is_right = answer.chars().eq(sorted);
        assert_eq!(verdict, if is_right { "right" } else { "wrong" }, "{printed}");
    }
    assert!(answers().filter(|line| line.ends_with("right")).count() >= 4, "{printed}");
}

#[test]
fn soft_targets_teach_the_teacher_and_its_student() {
    let printed = printed("soft_targets", &["--epochs", "4", "--students", "1"]);
    let rows: Vec<Vec<f64>> = printed
        .lines()
        .skip(1)
        .map(|line| line.split('|').skip(1).map(|cell| cell.trim().parse().expect("a number")))
        .map(Iterator::collect)
        .collect();
    assert_eq!(rows.len(), 4, "{printed}");
    for row in &rows {
        assert!(row[0] > 0.4, "chance is 0.1:\n{printed}");
        assert!(row[2] < 1.5, "the uniform distribution has 2.3:\n{printed}");
    }
    assert!(rows[0][1] < rows[1][1], "mixup lowers the confidence:\n{printed}");
    assert_ne!(rows[2], rows[3], "two students alike:\n{printed}");
}

#[test]
fn segmentation_learns() {
    let first = printed("segmentation", &["--steps", "1"]);
    let last = printed("segmentation", &["--steps", "20"]);
    let weights = numbers(&last, "weights [");
    assert!(weights[0] > 0.2 && weights[0] < 0.6, "most pixels are background:\n{last}");
    // The mean of uniform guesses is log 3 = 1.1.
    let [before, after] = [&first, &last].map(|printed| numbers(printed, "loss"));
    let mean = after.iter().sum::<f64>() / 5.;
    assert!(before[0] > 1. && mean < 0.95, "{first}\n{last}");
    // Background, disc, square; the mean. If all were background, the mean would be at most 0.33.
    let [before, after] = [&first, &last].map(|printed| numbers(printed, "IoU"));
    assert_eq!(after.len(), 4, "{last}");
    assert!(after[0] > 0.85 && after[3] > 0.4 && after[3] > before[3] + 0.1, "{first}\n{last}");
    assert!((after[..3].iter().sum::<f64>() / 3. - after[3]).abs() < 2e-3, "{last}");
}

#[test]
fn wrong_options_are_rejected_with_a_message() {
    let iris = "examples/calibration/data/iris.csv";
    for (example, option, value, message) in [
        ("image_classifier", "--epochs", "0", "0 is not in 1..=10000"),
        ("image_classifier", "--epsilon", "1.5", "epsilon is 1.5, expected a number from 0 to 1"),
        ("image_classifier", "--data", "no/such/file", "cannot use no/such/file"),
        ("image_classifier", "--data", iris, "4 numbers in a row, expected the 64 pixels"),
        ("causal_lm", "--steps", "0", "0 is not in 1.."),
        (
            "soft_targets",
            "--temperature",
            "0",
            "--temperature is 0, expected a number from 0.1 to 100",
        ),
        ("soft_targets", "--temperature", "1e300", "expected a number from 0.1 to 100"),
        ("image_classifier", "--epsilon", "-1", "epsilon is -1"),
        ("soft_targets", "--temperature", "inf", "--temperature is inf"),
        ("soft_targets", "--students", "0", "0 is not in 1..=1000"),
        ("soft_targets", "--data", iris, "4 numbers in a row"),
        ("segmentation", "--steps", "x", "invalid value 'x'"),
    ] {
        assert_fails(&run(example, &[option, value]), message);
    }
}
