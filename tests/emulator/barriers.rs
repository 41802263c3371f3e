//! The emulator detects each missing barrier, and the kernels pass in every order of the threads.

#[path = "../common/mod.rs"]
mod common;

use candle_core::DType;
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing};
use common::{Case, random, random_labels, values};
use std::process::{Command, Stdio};
use std::{env, error::Error};

const SOURCE: &str = include_str!("../../src/gpu/kernels.inc");

/// The lines of the source with this text.
fn lines_with(text: &str) -> Vec<usize> {
    let lines = SOURCE.lines().enumerate();
    lines.filter(|(_, line)| line.contains(text)).map(|(i, _)| i + 1).collect()
}

/// Thread orders: first to last, last to first, and two random orders.
const ORDERS: [&str; 4] = ["0", "1", "2", "3"];

/// Runs `rows_of_every_length` in a process of its own, without the barrier or the ticket of a line, and returns whether it
/// passed.
fn passes(order: &str, without_line: usize) -> Result<bool, Box<dyn Error>> {
    let status = Command::new(env::current_exe()?)
        .args(["--exact", "rows_of_every_length"])
        .env("EMULATOR_ORDER", order)
        .env("EMULATOR_WITHOUT_LINE", without_line.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    Ok(status.success())
}

#[test]
fn the_order_of_the_threads_does_not_matter() -> Result<(), Box<dyn Error>> {
    for order in ORDERS {
        assert!(passes(order, 0)?, "order {order}");
    }
    Ok(())
}

#[test]
fn every_barrier_is_needed() -> Result<(), Box<dyn Error>> {
    let barriers = lines_with("BLOCK_BARRIER()");
    assert!(barriers.len() >= 2, "barriers at {barriers:?}");
    for line in barriers {
        assert!(is_noticed(line)?, "nothing fails without the barrier of line {line}");
    }
    Ok(())
}

/// By its ticket, the last block of a launch knows that the others have ended.
#[test]
fn every_ticket_is_needed() -> Result<(), Box<dyn Error>> {
    let tickets = lines_with("TAKE_TICKET(");
    assert_eq!(tickets.len(), 1, "tickets at {tickets:?}");
    // Metal has no ticket.
    let is_metal = env::var("EMULATOR_SOURCE").as_deref() == Ok("metal");
    assert!(is_metal || is_noticed(tickets[0])?, "nothing fails without the ticket");
    Ok(())
}

/// Whether a test fails without the barrier or the ticket of a line, in one of the thread orders.
fn is_noticed(line: usize) -> Result<bool, Box<dyn Error>> {
    for order in ORDERS {
        if !passes(order, line)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The test that the processes above run. The rows fit one lane, a warp, several warps or several
/// blocks, with the classes last and with the rows last.
#[test]
fn rows_of_every_length() -> candle_core::Result<()> {
    for (dims, class_dim) in [
        (&[9, 5][..], 1),
        (&[100, 2], 1),
        (&[9, 300], 1),
        (&[30, 1500], 1),
        (&[30, 3000], 1),
        (&[1, 70_000], 1),
        (&[40, 100], 0),
        (&[2, 70, 90], 1),
        (&[9000, 2], 1),
    ] {
        let mut rows = dims.to_vec();
        let num_classes = rows.remove(class_dim);
        for reduction in [Reduction::None, Reduction::Mean] {
            let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?)
                .with_class_dim(class_dim)
                .with_ignore_index(0)
                .with_reduction(reduction);
            let case = Case {
                name: format!("{dims:?}"),
                loss,
                row_weights: None,
                logits: random(dims, 4., 1)?,
                targets: random_labels(&rows, num_classes, 2)?,
            };
            let actual = case.run(DType::F64)?;
            let expected = case.run_reference(DType::F64)?;
            for (actual, expected) in [(actual.0, expected.0), (actual.1, expected.1)] {
                for (actual, expected) in values(&actual)?.iter().zip(values(&expected)?) {
                    let error = (actual - expected).abs();
                    assert!(error < 1e-12, "{dims:?}: {actual}, expected {expected}");
                }
            }
        }
    }
    Ok(())
}
