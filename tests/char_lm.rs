//! The `char_lm` example, run as a program: training, sampling and error messages.

mod common;

use std::io::Result;
use std::process::{Command, Output};

/// Runs the example with a small model on `text`.
fn run(text: &str, arguments: &[&str]) -> Result<Output> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("text.txt");
    std::fs::write(&file, text)?;
    Command::new(common::example("char_lm"))
        .args(["--batch-size", "8", "--length", "16", "--hidden", "24", "--sample", "50"])
        .arg("--data")
        .arg(file)
        .args(arguments)
        .output()
}

fn printed(text: &str, arguments: &[&str]) -> Result<String> {
    let output = run(text, arguments)?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn stderr(text: &str, arguments: &[&str]) -> Result<String> {
    let output = run(text, arguments)?;
    assert!(!output.status.success(), "{arguments:?} passed");
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn loss_falls_and_the_sample_resembles_the_text() -> Result<()> {
    let text = "the cat sat on the m\u{e4}t. ".repeat(40);
    let arguments = ["--steps", "60", "--lr", "0.03"];
    let first = printed(&text, &arguments)?;
    let bits: Vec<f64> = first
        .lines()
        .filter_map(|line| line.split_once("loss ")?.1.split_once(" bits")?.0.parse().ok())
        .collect();
    // A uniform guess among twelve characters costs 3.6 bits.
    assert!(bits.len() == 10 && bits[0] > 1.5 && bits[9] < 1., "{first}");
    for part in ["12 of them different", "tokens a second", "MB of memory at most"] {
        assert!(first.contains(part), "no {part:?} in {first}");
    }
    let sample = |printed: &str| printed.split_once("\n\n").map(|(_, sample)| sample.to_string());
    let written = sample(&first).expect("a sample");
    assert_eq!(written.trim_end_matches('\n').chars().count(), 50, "{written}");
    assert!(written.contains("the "), "{written}");
    assert_eq!(sample(&printed(&text, &arguments)?), Some(written), "not the same in every run");
    Ok(())
}

#[test]
fn invalid_input_is_rejected_with_a_message() -> Result<()> {
    let text = "abc".repeat(200);
    for (text, arguments, expected) in [
        ("abc", &[][..], "the text has 3 characters, expected more than 170"),
        ("", &[], "the text has 0 characters"),
        (&text, &["--epsilon", "2"], "epsilon is 2, expected a number from 0 to 1"),
        (&text, &["--lr", "0"], "--lr is 0, expected more than 0"),
        (&text, &["--steps", "0"], "0 is not in 1.."),
    ] {
        let stderr = stderr(text, arguments)?;
        assert!(stderr.contains(expected), "{stderr}");
    }
    let nowhere =
        Command::new(common::example("char_lm")).args(["--data", "no/such/file"]).output()?;
    let stderr = String::from_utf8_lossy(&nowhere.stderr).into_owned();
    assert!(stderr.contains("cannot use no/such/file"), "{stderr}");
    Ok(())
}
