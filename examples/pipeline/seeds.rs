//! What smoothing does over many seeds: a single split of few rows says little.

use anyhow::Result;
use candle_core::Device;
use candle_label_smoothing::{LabelSmoothingLoss, Smoothing};

use crate::Args;
use crate::model::{BINS, train};
use crate::report::{QUALITIES, heading, progress};
use crate::table::{Split, Table, generate};

/// Trains with and without smoothing for each seed, and prints what that comes to.
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
        let quality = |loss| Ok(train(&args, &sizes, &split, loss, &bar)?.quality);
        let [smoothed, hard]: [Result<[f64; 3]>; 2] = losses.each_ref().map(quality);
        results.push((smoothed?, hard?));
    }
    bar.finish_and_clear();

    say!("{}", heading("Key insight, measured"));
    say!("  {seeds} seeds, {} epochs; means ± standard deviations", args.epochs);
    say!("  on the test rows           |      smoothed |  not smoothed |     difference");
    for (i, name) in QUALITIES.iter().enumerate() {
        let figures = |of: fn(&[f64; 3], &[f64; 3], usize) -> f64| {
            let figures = results.iter().map(|(smoothed, hard)| of(smoothed, hard, i));
            mean_and_deviation(&figures.collect::<Vec<_>>())
        };
        let (smoothed, smoothed_spread) = figures(|smoothed, _, i| smoothed[i]);
        let (hard, hard_spread) = figures(|_, hard, i| hard[i]);
        let (difference, spread) = figures(|smoothed, hard, i| smoothed[i] - hard[i]);
        say!(
            "  {name:26} | {smoothed:.3} ± {smoothed_spread:.3} | {hard:.3} ± {hard_spread:.3} | \
            {difference:+.3} ± {spread:.3}"
        );
    }
    say!("  (calibration error over {BINS} bins of equal width; differences within each seed)");
    Ok(())
}

/// The mean, and the deviation of a single figure from it.
fn mean_and_deviation(figures: &[f64]) -> (f64, f64) {
    let count = figures.len() as f64;
    let mean = figures.iter().sum::<f64>() / count;
    let squares = figures.iter().map(|figure| (figure - mean).powi(2)).sum::<f64>();
    (mean, (squares / (count - 1.)).sqrt())
}
