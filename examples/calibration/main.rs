//! Measures how label smoothing changes the accuracy, the confidence and the calibration of a classifier, over several seeds.
//! `cargo run --release --example calibration` runs it; with `-- --help` it lists the options.

mod metrics;
/// The lesson: its rows, network and training loop.
#[path = "../pipeline.rs"]
#[expect(dead_code, reason = "the lesson has its own output")]
mod pipeline;
mod plot;
mod table;

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use candle_label_smoothing::{LabelSmoothingLoss, Smoothing};
use candle_nn::Module;
use clap::{Parser, value_parser};
use console::style;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use metrics::{BINS, METRICS, Results, deviation, mean};
use pipeline::{Config, accept_closed_pipe, generate, scalar, split, train};
use plot::Picture;
use std::io::{self, Write};
use std::path::PathBuf;
use table::{Table, read_csv};

/// Trains the network of the example `pipeline` with label smoothing and without it, and compares both on the test rows.
#[derive(Parser)]
#[command(allow_negative_numbers = true)]
struct Args {
    /// CSV file of numbers with the class label (a word or a number) in the last column, header
    /// optional [default: 1000 generated rows, others for each seed]
    #[arg(long, value_name = "FILE.csv")]
    data: Option<PathBuf>,
    /// Share of each target that is spread over the other classes, from 0 to 1
    #[arg(long, default_value_t = 0.1)]
    epsilon: f64,
    /// Passes over the training rows
    #[arg(long, default_value_t = 5, value_parser = value_parser!(u32).range(1..=100_000))]
    epochs: u32,
    /// Rows in one step of the optimizer
    #[arg(long, default_value_t = 16, value_parser = value_parser!(u32).range(1..))]
    batch_size: u32,
    /// Peak of the learning rate
    #[arg(long, default_value_t = 0.75)]
    lr: f64,
    /// Sizes of the hidden layers, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "64,64",
          value_parser = value_parser!(u32).range(1..=4096))]
    hidden: Vec<u32>,
    /// First seed of the generated rows, the split, the initial weights and the order of the batches
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of seeds, from --seed on
    #[arg(long, value_name = "N", default_value_t = 10,
          value_parser = value_parser!(u32).range(1..=10_000))]
    seeds: u32,
    /// File for a picture of the training and the calibration
    #[arg(long, value_name = "FILE.svg|png")]
    plot: Option<PathBuf>,
}

fn main() -> Result<()> {
    accept_closed_pipe(run(&Args::parse(), &mut io::stdout()))
}

fn run(args: &Args, out: &mut impl Write) -> Result<()> {
    let lr = args.lr;
    ensure!(lr > 0. && lr.is_finite(), "--lr is {lr}, expected a finite number above 0");
    let smoothing = Smoothing::over_others(args.epsilon).context("--epsilon cannot be used")?;
    let table = match &args.data {
        Some(path) => read_csv(path).with_context(|| format!("cannot use {}", path.display()))?,
        None => generated(args.seed)?,
    };
    let picture = args.plot.as_deref().map(Picture::create).transpose()?;

    let ((num_rows, num_columns), num_classes) = (table.x.dims2()?, table.classes.len());
    writeln!(out, "{}", style("Data").bold())?;
    writeln!(out, "  {num_rows} rows x {num_columns} columns, {num_classes} classes")?;
    let classes = table.classes.iter().enumerate().map(|(i, name)| format!("{i} = {name}"));
    writeln!(out, "  classes: {}", classes.collect::<Vec<_>>().join(", "))?;
    let num_test = num_rows / 5;
    let num_train = num_rows - num_test;
    writeln!(out, "  training {num_train} x {num_columns}, test {num_test} x {num_columns}")?;

    let layer_sizes = [num_columns].into_iter().chain(args.hidden.iter().map(|&n| n as usize));
    let layer_sizes: Vec<usize> = layer_sizes.chain([num_classes]).collect();
    let bar = progress_bar(2 * u64::from(args.seeds))?;
    let smoothings = [smoothing, Smoothing::none()];
    let plain_loss = LabelSmoothingLoss::new(Smoothing::none());
    let mut results: [Results; 2] = Default::default();
    for seed in (0..args.seeds).map(|i| args.seed.wrapping_add(i.into())) {
        let Table { x, y, .. } = if args.data.is_some() { &table } else { &generated(seed)? };
        let [x_train, y_train, x_test, y_test] = split(x, y, seed, &Device::Cpu)?;
        let (layer_sizes, batch_size) = (layer_sizes.clone(), args.batch_size as usize);
        let config = Config { layer_sizes, lr, batch_size, epochs: args.epochs, seed };
        // Both trainings use the same initial weights and batches.
        for (smoothing, results) in smoothings.iter().zip(&mut results) {
            let (network, trace) = train(&x_train, &y_train, smoothing, &config)?;
            for (i, [loss, _]) in trace.iter().enumerate() {
                let (epoch, is_finite) = (i + 1, loss.is_finite());
                ensure!(is_finite, "the loss is {loss} in epoch {epoch}: --lr {lr} is too large");
            }
            let logits = network.forward(&x_test)?;
            let (loss, metrics) = plain_loss.forward_with_metrics(&logits, &y_test)?;
            let is_finite = scalar(&loss)?.is_finite();
            ensure!(is_finite, "the logits are not finite: --lr {lr} is too large");
            results.add(&metrics, &trace)?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    if let Some(picture) = picture {
        picture.draw(&results)?;
    }
    print_results(args, &results, out)
}

fn generated(seed: u64) -> Result<Table> {
    let (x, y) = generate(seed)?;
    Ok(Table { x, y, classes: ["A", "B", "C"].map(String::from).to_vec() })
}

/// A progress bar on standard output, hidden if that is no terminal.
fn progress_bar(num_trainings: u64) -> Result<ProgressBar> {
    let bar = ProgressBar::with_draw_target(Some(num_trainings), ProgressDrawTarget::stdout());
    let style = ProgressStyle::with_template("  {bar:40.cyan} {pos}/{len} trainings {eta}")?;
    bar.set_style(style);
    bar.tick();
    Ok(bar)
}

fn print_results(args: &Args, results: &[Results; 2], out: &mut impl Write) -> Result<()> {
    let Args { seeds, epochs, epsilon, .. } = args;
    let kind = if *seeds > 1 { "; means ± standard deviations" } else { "" };
    writeln!(out, "\n{}", style("Results").bold())?;
    writeln!(out, "  epsilon {epsilon}, epochs {epochs}, seeds {seeds}{kind}")?;
    let line = |name, [a, b, c]: [&str; 3]| format!("  {name:26} | {a:>13} | {b:>13} | {c:>14}");
    let names = ["smoothed", "not smoothed", "difference"];
    writeln!(out, "{}", line("on the test rows", names))?;
    let [smoothed, unsmoothed] = results.each_ref().map(|results| &results.metrics);
    for (name, (a, b)) in METRICS.into_iter().zip(smoothed.iter().zip(unsmoothed)) {
        let difference: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
        let spread = |values: &[f64]| match deviation(values) {
            Some(deviation) => format!(" ± {deviation:.3}"),
            None => String::new(),
        };
        let cell = |values: &[f64]| format!("{:.3}{}", mean(values), spread(values));
        let change = format!("{:+.3}{}", mean(&difference), spread(&difference));
        writeln!(out, "{}", line(name, [&cell(a), &cell(b), &change]))?;
    }
    writeln!(out, "  (calibration error over {BINS} bins of equal width)")?;
    let gaps = [smoothed, unsmoothed].map(|[accuracy, top, _]| mean(top) - mean(accuracy));
    let [with, without] = gaps.map(|gap| format!("{gap:+.3}"));
    let line = "mean top probability minus accuracy";
    Ok(writeln!(out, "  {line}: {with} with smoothing, {without} without")?)
}
