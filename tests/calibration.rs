//! The `calibration` example, run as a program: printed output, plots and error messages.

mod common;

use common::program::{self, TestResult, assert_fails, assert_near, figures, trace};
use std::collections::HashSet;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::process::Output;

fn run(arguments: &[&str]) -> Output {
    program::run("calibration", arguments)
}

fn printed(arguments: &[&str]) -> String {
    program::printed("calibration", arguments)
}

/// Runs the example on a file that contains `text`.
fn run_on(text: impl AsRef<[u8]>, arguments: &[&str]) -> Result<Output, std::io::Error> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("rows.csv");
    std::fs::write(&file, text)?;
    Ok(run(&[&["--data", path(&file)], arguments].concat()))
}

/// The figures of a run on a file that contains `text`.
fn figures_on(text: &str, arguments: &[&str]) -> Result<Vec<Vec<f64>>, std::io::Error> {
    let output = run_on(text, arguments)?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(figures(&String::from_utf8_lossy(&output.stdout)))
}

fn path(file: &Path) -> &str {
    file.to_str().expect("a temporary path is UTF-8")
}

#[test]
fn default_run_compares_ten_seeds() {
    let printed = printed(&["--epochs", "1"]);
    let texts = [
        "1000 rows x 10 columns, 3 classes",
        "0 = A, 1 = B, 2 = C",
        "training 800 x 10, test 200 x 10",
        "epochs 1, seeds 10; means ± standard deviations",
        "on the test rows",
        "smoothed",
        "not smoothed",
        "difference",
        "accuracy",
        "mean top probability",
        "expected calibration error",
        "mean top probability minus accuracy",
        "with smoothing",
        "without",
    ];
    program::assert_in_order(&printed, &texts);
}

#[test]
fn output_depends_on_the_seed_alone() -> TestResult {
    let arguments = ["--seeds", "1", "--batch-size", "100"];
    program::assert_depends_on_the_seed_alone("calibration", &arguments)
}

/// The example `pipeline` trains the same networks on the same rows.
#[test]
fn metrics_are_those_of_the_lesson() {
    let compared = figures(&printed(&["--seeds", "1", "--seed", "3"]));
    let lesson = figures(&program::printed("pipeline", &["--seed", "3"]));
    for (metric, line) in compared[..2].iter().enumerate() {
        assert_eq!(line[..2], [lesson[0][metric], lesson[1][metric]]);
    }
}

/// With one test row, the calibration error is the distance of the top probability from the accuracy, which is 0 or 1.
#[test]
fn calibration_error_of_one_row() -> TestResult {
    let rows = "1,2,a\n3,4,b\n5,6,a\n7,8,b\n9,10,a\n";
    let [accuracy, top, error] = &figures_on(rows, &["--seeds", "1"])?[..] else {
        return Err("expected three metrics".into());
    };
    for i in 0..2 {
        assert_near("error", &[error[i]], &[(top[i] - accuracy[i]).abs()], 1e-3);
    }
    Ok(())
}

#[test]
fn options_change_the_output() {
    let with = |options: &[&str]| printed(&[&["--seeds", "1", "--epochs", "1"], options].concat());
    let default = figures(&with(&[]));
    for (option, value) in [
        ("--epsilon", "0.3"),
        ("--batch-size", "999"),
        ("--lr", "0.1"),
        ("--hidden", "8,7,6"),
        ("--seed", "1"),
    ] {
        assert_ne!(figures(&with(&[option, value])), default, "{option}");
    }
    let none = with(&["--epsilon", "0"]);
    assert!(figures(&none).iter().all(|line| line[0] == line[1] && line[2] == 0.), "{none}");
    let names =
        ["data", "epsilon", "epochs", "batch-size", "lr", "hidden", "seed", "seeds", "plot"];
    program::assert_options("calibration", &names);
}

#[test]
fn invalid_options_are_rejected_with_a_message() {
    let cases = [
        ("--batch-size", "0", "batch-size"),
        ("--hidden", "32,0", "hidden"),
        ("--hidden", "", "hidden"),
        ("--lr", "0", "--lr is 0"),
        ("--lr", "inf", "--lr is inf"),
        ("--lr", "1e30", "too large"),
        ("--seeds", "0", "seeds"),
        ("--seeds", "10001", "seeds"),
        ("--data", "no/such/file.csv", "no/such/file.csv"),
    ];
    program::assert_rejects("calibration", &cases);
    // The only loss is that of the initial weights, which is finite.
    let output = run(&["--lr", "1e30", "--epochs", "1", "--batch-size", "999"]);
    assert_fails(&output, "the logits are not finite: --lr 1");
}

#[test]
fn invalid_files_are_rejected_with_line_and_column() -> TestResult {
    let good = "1,2,a\n3,4,b\n5,6,a\n7,8,b\n9,10,a\n";
    assert!(run_on(good, &[])?.status.success());
    for (text, message) in [
        ("", "line 1, column 1: the file is empty"),
        ("1\n2\n", "line 1, column 1: expected numbers"),
        ("x,label\n1\n2\n", "line 2, column 1: expected numbers"),
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
            "0,1,target\n1,2,a\n3,4,b\n5,6,a\n7,8,b\n9,9,a\n",
            "line 1, column 3: \"target\" is the label",
        ),
        (
            "6,2,no,yes\n1,2,0\n3,4,1\n5,6,2\n7,8,1\n9,9,0\n1,1,1\n",
            "line 4, column 3: no class \"2\"",
        ),
    ] {
        assert_fails(&run_on(text, &[])?, message);
    }
    assert_fails(&run_on(b"1,2,a\n3,\xff,b\n", &[])?, "line 2, column 2: the text is not UTF-8");
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
        let output = run_on(format!("{header}{}", rows(labels)), &[])?;
        let printed = String::from_utf8(output.stdout)?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{header:?}: {stderr}");
        assert!(printed.contains("50 rows x 2 columns, 2 classes"), "{printed}");
        assert!(printed.contains(classes), "{printed}");
        assert!(printed.contains("training 40 x 2"), "{printed}");
    }
    Ok(())
}

#[test]
fn accuracy_on_every_data_set_exceeds_one_half() {
    for (name, shape) in [
        ("iris", "150 rows x 4 columns, 3 classes"),
        ("wine", "178 rows x 13 columns, 3 classes"),
        ("digits", "800 rows x 64 columns, 10 classes"),
        ("glass", "214 rows x 9 columns, 6 classes"),
    ] {
        let file = format!("{}/examples/calibration/data/{name}.csv", env!("CARGO_MANIFEST_DIR"));
        let printed = printed(&["--data", &file, "--epochs", "10", "--lr", "0.1", "--seeds", "1"]);
        assert!(printed.contains(shape), "{printed}");
        // At most 36% of the rows belong to the most frequent class.
        for accuracy in &figures(&printed)[0][..2] {
            assert!(*accuracy > 0.5, "{printed}");
        }
    }
}

#[test]
fn column_that_is_constant_in_the_training_rows_keeps_its_scale() -> TestResult {
    let figures_with = |value: &str, seed: i32| -> Result<Vec<f64>, std::io::Error> {
        let rows = format!("1,{value},a\n2,0,b\n3,0,a\n4,0,b\n5,0,a\n");
        Ok(figures_on(&rows, &["--seeds", "1", "--seed", &seed.to_string()])?.concat())
    };
    // A value of 0.001 is negligible if the first row is the test row, as it is for some seeds.
    let mut equal = 0;
    for seed in 0..10 {
        let pairs = figures_with("0", seed)?.into_iter().zip(figures_with("0.001", seed)?);
        equal += i32::from(pairs.into_iter().all(|(a, b)| (a - b).abs() < 2e-3));
    }
    assert!(equal > 0);
    Ok(())
}

#[test]
fn several_seeds_print_mean_and_standard_deviation() -> TestResult {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/calibration/data/iris.csv");
    for rows in [&["--epochs", "2"][..], &["--epochs", "2", "--data", file]] {
        let printed_with = |options: [&str; 4]| printed(&[rows, &options].concat());
        let single =
            ["5", "6", "7"].map(|seed| figures(&printed_with(["--seeds", "1", "--seed", seed])));
        let many = figures(&printed_with(["--seed", "5", "--seeds", "3"]));
        assert_eq!(many.len(), 3);
        for (i, line) in many.iter().enumerate() {
            for run in &single {
                assert!((run[i][2] - (run[i][0] - run[i][1])).abs() < 2e-3, "{single:?}");
            }
            let column = |of: fn(&[f64]) -> f64| {
                let values = single.each_ref().map(|run| of(&run[i]));
                let mean = values.iter().sum::<f64>() / 3.;
                let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
                [mean, (squares / 2.).sqrt()]
            };
            let columns: [fn(&[f64]) -> f64; 3] =
                [|run| run[0], |run| run[1], |run| run[0] - run[1]];
            let expected = columns.map(column).concat();
            // The output has three decimals, in the single runs and in the means.
            assert_near("seeds", line, &expected, 2e-3);
        }
    }
    Ok(())
}

#[test]
fn svg_plot_shows_the_means_over_the_seeds() -> TestResult {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("picture.SVG");
    // The plot replaces a longer file.
    std::fs::write(&file, vec![b'x'; 1 << 20])?;
    let arguments = ["--seeds", "2", "--plot", path(&file)];
    assert_eq!(printed(&arguments), printed(&["--seeds", "2"]));
    let text = std::fs::read_to_string(&file)?;
    assert!(run(&arguments).status.success());
    assert_eq!(text, std::fs::read_to_string(&file)?, "the same run, another picture");

    let document = roxmltree::Document::parse(&text)?;
    let of_kind = |kind| document.descendants().filter(move |node| node.has_tag_name(kind));
    let words: Vec<_> = of_kind("text").filter_map(|node| node.text()).map(str::trim).collect();
    for word in ["smoothed", "not smoothed", "Loss", "Accuracy", "epoch", "5"] {
        assert!(words.contains(&word), "no {word:?} among {words:?}");
    }
    // The training curves have five points. The first two curves of a colour are loss and accuracy.
    let heights = |colour| {
        let lines =
            of_kind("polyline").filter(move |node| node.attribute("stroke") == Some(colour));
        let points = lines.filter_map(|node| node.attribute("points"));
        let points = points.map(|points| points.split_whitespace().collect::<Vec<_>>());
        let lines = points.filter(|points| points.len() == 5);
        let y = |point: &&str| point.split(',').nth(1).and_then(|y| y.parse::<f64>().ok());
        lines.filter_map(move |line| line.iter().map(y).collect()).collect::<Vec<Vec<f64>>>()
    };
    // The example `pipeline` trains the same network on the same rows.
    let (mut losses, mut accuracies) = ([0.; 5], [0.; 5]);
    for seed in ["0", "1"] {
        let (loss, accuracy) = trace(&program::printed("pipeline", &["--seed", seed]));
        for epoch in 0..5 {
            losses[epoch] += loss[epoch];
            accuracies[epoch] += accuracy[epoch];
        }
    }
    let part = |line: &[f64]| -> Vec<f64> {
        line.iter().map(|value| (value - line[0]) / (line[4] - line[0])).collect()
    };
    let smoothed = heights("#0072B2");
    assert_near("loss", &part(&smoothed[0]), &part(&losses), 0.02);
    assert_near("accuracy", &part(&smoothed[1]), &part(&accuracies), 0.02);
    assert_eq!(heights("#D55E00").len(), 2);
    for colour in ["#0072B2", "#D55E00"] {
        let dots = of_kind("circle").filter(|node| {
            node.attribute("fill") == Some(colour) && node.attribute("opacity") == Some("0.7")
        });
        // With three classes, the top probability is above one third, so the first three of ten
        // bins are empty.
        assert!((4..=7).contains(&dots.count()), "{text}");
    }
    Ok(())
}

#[test]
fn png_plot_has_its_size_and_colours() -> TestResult {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("picture.png");
    for epochs in ["1", "30"] {
        let plot = ["--plot", path(&file), "--seeds", "1", "--batch-size", "100"];
        assert!(run(&[&plot[..], &["--epochs", epochs]].concat()).status.success());
        let mut reader = png::Decoder::new(BufReader::new(File::open(&file)?)).read_info()?;
        let mut pixels = vec![0; reader.output_buffer_size().ok_or("too large")?];
        let info = reader.next_frame(&mut pixels)?;
        assert_eq!((info.width, info.height), (2160, 800));
        let colours: HashSet<&[u8]> = pixels.chunks(3).collect();
        for colour in [[255, 255, 255], [0, 114, 178], [213, 94, 0]] {
            assert!(colours.contains(&colour[..]), "{epochs} epochs: no {colour:?}");
        }
    }
    Ok(())
}

#[test]
fn invalid_plot_path_is_rejected_before_training() -> TestResult {
    let folder = tempfile::tempdir()?;
    std::fs::create_dir(folder.path().join("folder.svg"))?;
    for (name, message) in [
        ("picture.jpg", "ends in .svg or .png"),
        ("svg", "ends in .svg or .png"),
        ("no/such/folder/picture.svg", "cannot draw"),
        ("folder.svg", "cannot draw"),
    ] {
        let output = run(&["--plot", path(&folder.path().join(name))]);
        assert_fails(&output, message);
        assert_fails(&output, name);
        // The first line is printed before the training.
        assert!(output.stdout.is_empty(), "{name}: {output:?}");
    }
    Ok(())
}

/// Output of a run with one seed on a terminal.
#[cfg(target_os = "linux")]
fn on_terminal(variables: &[(&str, &str)]) -> Result<String, std::io::Error> {
    use std::io::Read;
    use std::os::fd::{FromRawFd, OwnedFd};

    let (mut controller, mut terminal) = (0, 0);
    let [name, settings, size] = [std::ptr::null_mut(); 3];
    // SAFETY: openpty writes the two descriptors, and nothing else owns them.
    let (mut controller, terminal) = unsafe {
        if libc::openpty(&mut controller, &mut terminal, name, settings.cast(), size.cast()) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        (File::from_raw_fd(controller), OwnedFd::from_raw_fd(terminal))
    };
    let mut command = program::program("calibration", &["--seeds", "1"]);
    command.env_remove("NO_COLOR").envs(variables.iter().copied()).stdout(terminal);
    let mut child = command.spawn()?;
    drop(command);
    let mut written = Vec::new();
    // Linux returns an error from this read when the program has closed its end.
    let _ = controller.read_to_end(&mut written);
    assert!(child.wait()?.success());
    Ok(String::from_utf8_lossy(&written).replace("\r\n", "\n"))
}

#[test]
#[cfg(target_os = "linux")]
fn colours_and_progress_bar_appear_only_on_a_terminal() -> TestResult {
    let piped = printed(&["--seeds", "1"]);
    assert!(!piped.contains('\x1b'), "{piped}");
    let coloured = |text: &str| text.contains("\x1b[1m") || text.contains("\x1b[36m");
    let bar = |text: &str| text.contains('█');
    let shown = on_terminal(&[("TERM", "xterm")])?;
    assert!(coloured(&shown) && bar(&shown), "{shown:?}");
    let plain = on_terminal(&[("TERM", "xterm"), ("NO_COLOR", "1")])?;
    assert!(!coloured(&plain) && bar(&plain), "{plain:?}");
    assert_eq!(piped, on_terminal(&[("TERM", "dumb")])?);
    Ok(())
}

#[test]
fn closed_stdout_is_no_error() -> TestResult {
    program::assert_accepts_closed_stdout("calibration", &["--seeds", "1"])
}
