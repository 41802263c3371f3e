//! That the emulator notices a missing barrier, wherever it is, and nothing else.

#[path = "../common/mod.rs"]
mod common;

use candle_core::DType;
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing};
use common::{Case, random, random_labels, values};
use std::process::{Command, Stdio};
use std::{env, error::Error};

/// The source that the emulator runs, and its barriers.
fn source() -> (&'static str, &'static str) {
    match env::var("EMULATOR_SOURCE").as_deref() {
        Ok("metal") => {
            (include_str!("../../src/backend/label_smoothing.metal"), "threadgroup_barrier(")
        }
        _ => (include_str!("../../src/backend/label_smoothing.cu"), "__syncthreads()"),
    }
}

/// Orders of the threads: as they are counted, the other way round, and two at random.
const ORDERS: [&str; 4] = ["0", "1", "2", "3"];

/// The other tests of the kernels, in a process of its own.
fn passes(order: &str, without_barrier: usize) -> Result<bool, Box<dyn Error>> {
    let status = Command::new(env::current_exe()?)
        .args(["--exact", "rows_of_every_length"])
        .env("EMULATOR_ORDER", order)
        .env("EMULATOR_WITHOUT_BARRIER", without_barrier.to_string())
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
    let (source, barrier) = source();
    let lines = source.lines().enumerate();
    let barriers: Vec<_> =
        lines.filter(|(_, line)| line.contains(barrier)).map(|(i, _)| i + 1).collect();
    assert!(barriers.len() >= 3, "barriers at {barriers:?}");
    for line in barriers {
        let mut noticed = false;
        for order in ORDERS {
            noticed = noticed || !passes(order, line)?;
        }
        assert!(noticed, "nothing fails without the barrier of line {line}");
    }
    Ok(())
}

/// What the processes above run: rows that one lane has, a warp, several warps, several blocks, both ways through memory.
#[test]
fn rows_of_every_length() -> candle_core::Result<()> {
    for (dims, class_dim) in [
        (&[9, 5][..], 1),
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
                logits: random(dims, 4., 1)?,
                targets: random_labels(&rows, num_classes, 2)?,
            };
            let ours = case.run(DType::F64)?;
            let theirs = case.run_reference(DType::F64)?;
            for (ours, theirs) in [(ours.0, theirs.0), (ours.1, theirs.1)] {
                for (ours, theirs) in values(&ours)?.iter().zip(values(&theirs)?) {
                    let error = (ours - theirs).abs();
                    assert!(error < 1e-12, "{dims:?}: {ours} and {theirs}");
                }
            }
        }
    }
    Ok(())
}
