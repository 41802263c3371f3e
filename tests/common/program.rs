//! Examples, run as programs.

use std::process::{Command, Output, Stdio};

pub type TestResult = Result<(), Box<dyn std::error::Error>>;

pub fn program(example: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(super::example(example));
    // The environment of the tests may force colours.
    command.args(arguments).env_remove("CLICOLOR_FORCE");
    command
}

pub fn run(example: &str, arguments: &[&str]) -> Output {
    program(example, arguments)
        .output()
        .expect("`cargo test` builds the examples, `cargo test --test pipeline` alone does not")
}

pub fn printed(example: &str, arguments: &[&str]) -> String {
    let output = run(example, arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    String::from_utf8(output.stdout).expect("the example prints UTF-8")
}

pub fn assert_fails(output: &Output, message: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "no failure, expected {message:?}");
    assert!(stderr.contains(message), "{stderr}, expected {message:?}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

/// Checks that each of these values of an option, and of the options that all examples have, is rejected with its message.
pub fn assert_rejects(example: &str, cases: &[(&str, &str, &str)]) {
    let common = [
        ("--epsilon", "1.5", "epsilon is 1.5"),
        ("--epsilon", "-1", "epsilon is -1"),
        ("--epsilon", "NaN", "epsilon is NaN"),
        ("--epochs", "0", "epochs"),
        ("--seed", "-1", "seed"),
    ];
    for &(option, value, message) in common.iter().chain(cases) {
        assert_fails(&run(example, &[option, value]), message);
    }
}

/// Checks that the output is that of the seed in every run, on any number of threads.
pub fn assert_depends_on_the_seed_alone(example: &str, arguments: &[&str]) -> TestResult {
    let with_seed = |seed| [arguments, &["--seed", seed]].concat();
    let first = printed(example, &with_seed("3"));
    assert_eq!(first, printed(example, &with_seed("3")));
    assert_ne!(first, printed(example, &with_seed("4")));
    let mut alone = program(example, &with_seed("3"));
    assert_eq!(first.as_bytes(), alone.env("RAYON_NUM_THREADS", "1").output()?.stdout);
    Ok(())
}

/// Checks that `texts` follow one another in `printed`.
pub fn assert_in_order(printed: &str, texts: &[&str]) {
    let mut rest = printed;
    for text in texts {
        let position = rest.find(text);
        let position = position.unwrap_or_else(|| panic!("no {text:?} in its place:\n{printed}"));
        rest = &rest[position + text.len()..];
    }
}

/// Checks the names of the options in the help, which has `--help` itself as the last one.
pub fn assert_options(example: &str, names: &[&str]) {
    let help = printed(example, &["--help"]);
    let options = help.lines().filter_map(|line| line.trim_start().strip_prefix("--"));
    let options = options.filter_map(|line| line.split_whitespace().next());
    assert_eq!(options.collect::<Vec<_>>(), names, "{help}");
}

/// Runs the example as in `example | head`.
pub fn assert_accepts_closed_stdout(example: &str, arguments: &[&str]) -> TestResult {
    let mut command = program(example, arguments);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    drop(child.stdout.take());
    let output = child.wait_with_output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.is_empty(), "{stderr}");
    Ok(())
}

pub fn assert_near(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: {found:?}");
    for (found_one, expected_one) in found.iter().zip(expected) {
        let distance = (found_one - expected_one).abs();
        assert!(distance <= tolerance, "{what}: {found:?}, expected {expected:?}");
    }
}

/// Losses and accuracies of the training trace that `pipeline` prints.
pub fn trace(printed: &str) -> (Vec<f64>, Vec<f64>) {
    let rows = printed.lines().skip_while(|line| !line.contains("epoch |"));
    let rows = rows.skip(1).take_while(|line| line.contains(" | "));
    let figure = |text: &str| text.trim().parse::<f64>().expect("a figure");
    rows.map(|line| {
        let cells: Vec<&str> = line.split('|').collect();
        (figure(cells[1]), figure(cells[2]))
    })
    .unzip()
}

/// The figures of the final table: one line for each of its lines, one number for each column.
pub fn figures(printed: &str) -> Vec<Vec<f64>> {
    let lines = printed.lines().skip_while(|line| !line.starts_with("  on the test rows"));
    let lines = lines.skip(1).take_while(|line| line.contains(" | "));
    let cells = lines.map(|line| line.split(['|', '±']).skip(1));
    cells.map(|cells| cells.map(|cell| cell.trim().parse().expect("a figure")).collect()).collect()
}
