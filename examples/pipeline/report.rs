//! Describes the results in words and as a chart.

use anyhow::Result;
use candle_core::Tensor;
use console::{StyledObject, style};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::model::Epoch;

pub const METRICS: [&str; 3] = ["accuracy", "mean top probability", "expected calibration error"];

pub fn heading(text: &str) -> StyledObject<&str> {
    style(text).bold()
}

pub fn verdict(is_right: bool) -> StyledObject<&'static str> {
    if is_right { style("right").green() } else { style("wrong").red() }
}

/// A progress bar on standard output, hidden if that is not a terminal.
pub fn progress(steps: u64) -> Result<ProgressBar> {
    let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stdout());
    Ok(bar.with_style(ProgressStyle::with_template("  {bar:40.cyan} {pos}/{len} {msg} {eta}")?))
}

/// Describes the last epoch, compared with the one before or, for the first epoch, with uniform probabilities.
pub fn observe(trace: &[Epoch], classes: usize, min_loss: f64) -> String {
    let uniform_loss = (classes as f64).ln();
    match trace {
        [.., before, now] => {
            let percent = 100. * (before.loss - now.loss) / (before.loss - min_loss).max(1e-9);
            let gain = 100. * (now.accuracy - before.accuracy);
            let pace = match percent {
                ..0. => {
                    return format!(
                        "loss up by {:.3}, accuracy {gain:+.1} points",
                        now.loss - before.loss
                    );
                }
                ..10. => "slow",
                ..25. => "steady",
                _ => "fast",
            };
            format!(
                "{pace}: {percent:.0}% of the way left to {min_loss:.3}, accuracy {gain:+.1} points"
            )
        }
        [now] if now.loss > uniform_loss => {
            format!("worse than a guess (ln {classes} = {uniform_loss:.3}): sure and often wrong")
        }
        _ => format!("better than a guess (ln {classes} = {uniform_loss:.3})"),
    }
}

/// Prints a chart of the loss over the epochs.
pub fn print_chart(trace: &[Epoch]) -> Result<()> {
    const HEIGHT: usize = 8;
    // A chart of many epochs shows every n-th of them, so that it stays within 60 characters.
    let losses = trace.iter().map(|epoch| epoch.loss).enumerate();
    let shown: Vec<(usize, f64)> = losses.step_by(trace.len().div_ceil(12)).collect();
    let low = shown.iter().fold(f64::INFINITY, |low, point| low.min(point.1));
    let high = shown.iter().fold(low, |high, point| high.max(point.1));
    let step = ((high - low) / (HEIGHT - 1) as f64).max(1e-9);
    let level = |loss: f64| ((high - loss) / step).round() as usize;
    say!("   loss");
    for row in 0..HEIGHT {
        let star = format!("    {}", style("*").cyan());
        let mark = |&(_, loss): &(usize, f64)| if level(loss) == row { &star } else { "     " };
        let line: String = shown.iter().map(mark).collect();
        say!("  {:5.2} |{}", high - step * row as f64, line.trim_end());
    }
    say!("        +{}", "-----".repeat(shown.len()));
    let numbers: String = shown.iter().map(|(i, _)| format!("{:5}", i + 1)).collect();
    say!("   epoch {numbers}");
    Ok(())
}

/// Formats the values of one row and leaves out the middle of a long one.
pub fn show(row: &Tensor) -> Result<String> {
    let values = row.flatten_all()?.to_vec1::<f32>()?;
    let mut texts: Vec<_> = values.iter().map(|value| format!("{value:.2}")).collect();
    if texts.len() > 10 {
        texts.splice(8..texts.len() - 1, ["...".to_string()]);
    }
    Ok(format!("[{}]", texts.join(", ")))
}

/// Describes how smoothing changed the METRICS.
pub fn conclude(smoothed: [f64; 3], unsmoothed: [f64; 3]) -> String {
    // A difference below the printed precision counts as none.
    let change = |i: usize, less, more| match smoothed[i] - unsmoothed[i] {
        ..-5e-4 => less,
        5e-4.. => more,
        _ => "as",
    };
    let (sure, calibrated) = (change(1, "less", "more"), change(2, "better", "worse"));
    let gaps = [smoothed, unsmoothed].map(|[accuracy, top, _]| format!("{:+.3}", top - accuracy));
    format!(
        "Smoothing made the model {sure} sure and {calibrated} calibrated on these rows:\n  \
        the mean top probability is {} off the accuracy with it, {} without.",
        gaps[0], gaps[1]
    )
}
