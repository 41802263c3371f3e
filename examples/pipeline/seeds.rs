//! Repeats the training with many seeds, since the result of a single split of few rows varies strongly.

use anyhow::Result;
use candle_core::Device;
use candle_label_smoothing::{LabelSmoothingLoss, Smoothing};

use crate::Args;
use crate::model::{BINS, train};
use crate::report::{METRICS, heading, progress};
use crate::table::{Split, Table, generate};

/// Trains with and without smoothing for each seed, and prints the means and the standard deviations.
pub fn repeat(
    args: &Args,
    seeds: u32,
    table: &Table,
    smoothing: &Smoothing,
    device: &Device,
) -> Result<()> {
    let losses = [smoothing.clone(), Smoothing::none()].map(LabelSmoothingLoss::new);
    let sizes = args.sizes(table);
    let rows = table.rows.len();
    let bar = progress(2 * u64::from(seeds) * args.steps(rows - rows / 5))?;
    let mut results = Vec::new();
    for seed in (0..seeds).map(|i| args.seed.wrapping_add(i.into())) {
        // A file has the same rows for every seed.
        let table = if args.data.is_some() { table } else { &generate(seed) };
        let split = Split::new(table, seed, device)?;
        let args = Args { seed, ..args.clone() };
        let metrics = |loss| Ok(train(&args, &sizes, &split, loss, &bar)?.metrics);
        let [smoothed, unsmoothed]: [Result<[f64; 3]>; 2] = losses.each_ref().map(metrics);
        results.push((smoothed?, unsmoothed?));
    }
    bar.finish_and_clear();

    say!("{}", heading("Key insight, measured"));
    say!("  {seeds} seeds, {} epochs; means ± standard deviations", args.epochs);
    say!("  on the test rows           |      smoothed |  not smoothed |     difference");
    for (i, name) in METRICS.iter().enumerate() {
        let summarize = |value: fn(&[f64; 3], &[f64; 3], usize) -> f64| {
            let values =
                results.iter().map(|(smoothed, unsmoothed)| value(smoothed, unsmoothed, i));
            mean_and_deviation(&values.collect::<Vec<_>>())
        };
        let (smoothed, smoothed_deviation) = summarize(|smoothed, _, i| smoothed[i]);
        let (unsmoothed, unsmoothed_deviation) = summarize(|_, unsmoothed, i| unsmoothed[i]);
        let (difference, deviation) =
            summarize(|smoothed, unsmoothed, i| smoothed[i] - unsmoothed[i]);
        say!(
            "  {name:26} | {smoothed:.3} ± {smoothed_deviation:.3} | \
            {unsmoothed:.3} ± {unsmoothed_deviation:.3} | {difference:+.3} ± {deviation:.3}"
        );
    }
    say!("  (calibration error over {BINS} bins of equal width; differences within each seed)");
    Ok(())
}

/// The mean and the sample standard deviation.
fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    (mean, (squares / (count - 1.)).sqrt())
}
