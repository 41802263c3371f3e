//! What the figures say, in words and as a chart.

use anyhow::Result;
use candle_core::Tensor;
use console::{StyledObject, style};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::model::Epoch;

pub const QUALITIES: [&str; 3] = ["accuracy", "mean top probability", "expected calibration error"];

pub fn heading(text: &str) -> StyledObject<&str> {
    style(text).bold()
}

pub fn verdict(is_right: bool) -> StyledObject<&'static str> {
    if is_right { style("right").green() } else { style("wrong").red() }
}

/// A bar where the lines go, if that is a terminal.
pub fn progress(steps: u64) -> Result<ProgressBar> {
    let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stdout());
    Ok(bar.with_style(ProgressStyle::with_template("  {bar:40.cyan} {pos}/{len} {msg} {eta}")?))
}

/// What the figures of the last epoch say, against the one before or against a guess.
pub fn observe(trace: &[Epoch], classes: usize, floor: f64) -> String {
    let guess = (classes as f64).ln();
    match trace {
        [.., before, now] => {
            let share = 100. * (before.loss - now.loss) / (before.loss - floor).max(1e-9);
            let gain = 100. * (now.accuracy - before.accuracy);
            let pace = match share {
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
            format!("{pace}: {share:.0}% of the way left to {floor:.3}, accuracy {gain:+.1} points")
        }
        [now] if now.loss > guess => {
            format!("worse than a guess (ln {classes} = {guess:.3}): sure and often wrong")
        }
        _ => format!("better than a guess (ln {classes} = {guess:.3})"),
    }
}

/// The loss over the epochs.
pub fn print_chart(trace: &[Epoch]) -> Result<()> {
    const HEIGHT: usize = 8;
    // A long training shows every n-th epoch, so that the chart stays within 60 characters.
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

/// The values of one row, the middle of a long one left out.
pub fn show(row: &Tensor) -> Result<String> {
    let values = row.flatten_all()?.to_vec1::<f32>()?;
    let mut texts: Vec<_> = values.iter().map(|value| format!("{value:.2}")).collect();
    if texts.len() > 10 {
        texts.splice(8..texts.len() - 1, ["...".to_string()]);
    }
    Ok(format!("[{}]", texts.join(", ")))
}

pub fn conclude(smoothed: [f64; 3], hard: [f64; 3]) -> String {
    // What would be printed as the same figure is no difference.
    let change = |i: usize, less, more| match smoothed[i] - hard[i] {
        ..-5e-4 => less,
        5e-4.. => more,
        _ => "as",
    };
    let (sure, calibrated) = (change(1, "less", "more"), change(2, "better", "worse"));
    let gaps = [smoothed, hard].map(|[right, sure, _]| format!("{:+.3}", sure - right));
    format!(
        "Smoothing made the model {sure} sure and {calibrated} calibrated on these rows:\n  \
        the mean top probability is {} off the accuracy with it, {} without.",
        gaps[0], gaps[1]
    )
}
