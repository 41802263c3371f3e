//! Trains a small classifier with label smoothing, from raw rows to calibrated probabilities.
//! `cargo run --example pipeline` runs it; `cargo run --example pipeline -- --help` lists the options.

/// Like `println!`, but returns an error instead of panicking if standard output is closed.
macro_rules! say {
    ($($line:tt)*) => {{
        use std::io::Write;
        writeln!(std::io::stdout(), $($line)*)?;
    }};
}

mod model;
mod plot;
mod report;
mod seeds;
mod table;

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device};
use candle_label_smoothing::{LabelSmoothingLoss, Smoothing, smooth_targets};
use candle_nn::{Module, ops::softmax};
use clap::{Parser, ValueEnum, value_parser};
use model::{BINS, train};
use plot::Picture;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use report::{METRICS, conclude, heading, observe, print_chart, progress, show, verdict};
use seeds::repeat;
use std::io;
use std::path::PathBuf;
use table::{Split, Table, generate, read_csv};

/// Trains a multilayer perceptron with label smoothing, and once more without it to compare.
#[derive(Clone, Parser)]
#[command(allow_negative_numbers = true)]
struct Args {
    /// Rows to learn from: a CSV file of numbers with the class label (a word or a number) in the last
    /// column, header optional [default: 1000 generated rows]
    #[arg(long, value_name = "FILE.csv")]
    data: Option<PathBuf>,
    /// How much of each target is spread over other classes, from 0 to 1
    #[arg(long, default_value_t = 0.1)]
    epsilon: f64,
    /// Which classes epsilon is spread over
    #[arg(long, value_enum, default_value_t = Convention::Others)]
    convention: Convention,
    /// Passes over the training rows
    #[arg(long, default_value_t = 5, value_parser = value_parser!(u32).range(1..=100_000))]
    epochs: u32,
    /// Rows in one step of the optimizer
    #[arg(long, default_value_t = 16, value_parser = value_parser!(u32).range(1..))]
    batch_size: u32,
    /// Peak of the learning rate of the stochastic gradient descent
    #[arg(long, default_value_t = 0.75)]
    lr: f64,
    /// Sizes of the hidden layers, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "64,64",
          value_parser = value_parser!(u32).range(1..=4096))]
    hidden: Vec<u32>,
    /// Seed of the generated rows, the split, the initial weights and the order of the batches
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Repeat it with this many seeds, from --seed on, and print the means alone
    #[arg(long, value_name = "N", conflicts_with = "plot",
          value_parser = value_parser!(u32).range(2..=10_000))]
    seeds: Option<u32>,
    /// Draw the training and the calibration
    #[arg(long, value_name = "FILE.svg|png")]
    plot: Option<PathBuf>,
    /// Where to compute; cuda and metal need the feature of the same name
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    device: DeviceName,
}

impl Args {
    /// The sizes of all layers, from the input to the output.
    fn sizes(&self, table: &Table) -> Vec<usize> {
        let hidden = self.hidden.iter().map(|&size| size as usize);
        [table.columns()].into_iter().chain(hidden).chain([table.classes.len()]).collect()
    }

    /// The number of optimizer steps in one training.
    fn steps(&self, rows: usize) -> u64 {
        rows.div_ceil(self.batch_size as usize) as u64 * u64::from(self.epochs)
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Convention {
    /// The label keeps 1-epsilon, the other classes share epsilon (tensor2tensor, fairseq)
    Others,
    /// Every class gets epsilon/K, the label too (PyTorch, Keras)
    All,
    /// Hard labels: plain cross-entropy, whatever epsilon says
    None,
}

#[derive(Clone, Copy, ValueEnum)]
enum DeviceName {
    Cpu,
    Cuda,
    Metal,
}

/// The streams of random numbers that a seed gives. Each purpose has its own stream, so that a change to one (more epochs,
/// another network) does not change the numbers of the others.
#[derive(Clone, Copy)]
enum Stream {
    Rows,
    Split,
    Weights,
    Batches,
}

fn rng(seed: u64, stream: Stream) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream as u64);
    rng
}

fn main() -> Result<()> {
    run().or_else(|error| match error.downcast_ref::<io::Error>() {
        // The reader of the output, for example `head`, has closed the pipe.
        Some(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        _ => Err(error),
    })
}

fn run() -> Result<()> {
    let args = Args::parse();
    let lr = args.lr;
    ensure!(lr > 0. && lr.is_finite(), "--lr is {lr}, expected more than 0");
    let smoothing = match args.convention {
        Convention::Others => Smoothing::over_others(args.epsilon),
        Convention::All => Smoothing::over_all(args.epsilon),
        Convention::None => Ok(Smoothing::none()),
    }
    .context("--epsilon cannot be used")?;
    let device = match args.device {
        DeviceName::Cpu => Ok(Device::Cpu),
        DeviceName::Cuda => Device::new_cuda(0),
        DeviceName::Metal => Device::new_metal(0),
    }
    .context("--device cannot be used; cuda and metal need `--features` of the same name")?;

    say!("{}", heading("Raw data input"));
    let table = match &args.data {
        Some(path) => read_csv(path).with_context(|| format!("cannot use {}", path.display()))?,
        None => generate(args.seed),
    };
    let picture = args.plot.as_ref().map(|path| {
        Picture::create(path).with_context(|| format!("cannot draw {}", path.display()))
    });
    let picture = picture.transpose()?;
    let (rows, columns, classes) = (table.rows.len(), table.columns(), table.classes.len());
    say!("  {rows} rows x {columns} columns, {classes} classes");
    let names = table.classes.iter().enumerate();
    let names: Vec<_> = names.map(|(i, name)| format!("{i} = {name}")).collect();
    say!("  classes: {}", names.join(", "));
    say!("  first row {:?}, class {}\n", table.rows[0], table.labels[0]);

    if let Some(seeds) = args.seeds {
        return repeat(&args, seeds, &table, &smoothing, &device);
    }

    say!("{}", heading("Train/test split"));
    let split = Split::new(&table, args.seed, &device)?;
    let (y_train, (x_test, y_test)) = (&split.training.1, &split.test);
    say!("  training {} x {columns}", split.training_rows.len());
    say!("  test     {} x {columns}", split.test_rows.len());

    say!("\n{}", heading("Label smoothing applied"));
    let soft = smooth_targets(y_train, classes, &smoothing)?;
    say!("  soft targets {} x {}", soft.dim(0)?, soft.dim(1)?);
    let soft = soft.to_vec2::<f32>()?;
    // In a small file, class 1 may have no training row.
    let example = split.training_rows.iter().position(|&row| table.labels[row] == 1);
    let example = example.unwrap_or(0);
    let row = split.training_rows[example];
    let label = table.labels[row];
    let hard: Vec<u32> = (0..classes as u32).map(|k| (k == label) as u32).collect();
    say!("  first training row of class {label}: {:.2?}", table.rows[row]);
    say!("  hard label {hard:?}");
    say!("  soft label {:?}", soft[example]);
    // The lowest possible loss is the entropy of the soft label.
    let terms = soft[example].iter().filter(|&&q| q > 0.);
    let min_loss: f64 = terms.map(|&q| -f64::from(q) * f64::from(q).ln()).sum();

    say!("\n{}", heading("Model training"));
    let sizes = args.sizes(&table);
    say!("  layer sizes {sizes:?}, ReLU between them");
    say!("  SGD, learning rate up to {lr}, batches of {}", args.batch_size);
    let loss = LabelSmoothingLoss::new(smoothing.clone());
    let bar = progress(args.steps(split.training_rows.len()))?;
    let smoothed = train(&args, &sizes, &split, &loss, &bar)?;
    bar.finish_and_clear();
    let trace = &smoothed.trace;

    say!("\n{}", heading("Training trace"));
    say!("  epoch |   loss | accuracy | observation");
    for (i, epoch) in trace.iter().enumerate() {
        let (loss, accuracy) = (epoch.loss, epoch.accuracy);
        let observation = observe(&trace[..=i], classes, min_loss);
        let number = i + 1;
        say!("  {number:5} | {loss:6.3} | {accuracy:8.3} | {observation}");
    }
    let accuracy = smoothed.metrics[0];
    let gap = accuracy - trace.last().map_or(0., |epoch| epoch.accuracy);
    say!("  accuracy on the test rows: {accuracy:.3}");
    say!("  ({gap:+.3} against the training rows of the last epoch)\n");
    print_chart(trace)?;

    say!("\n{}", heading("Prediction trace"));
    let (x, y) = (x_test.narrow(0, 0, 1)?, y_test.narrow(0, 0, 1)?);
    let target = table.labels[split.test_rows[0]] as usize;
    say!("  the first test row, label {target}");
    say!("  layer 1, {columns} values, input: {}", show(&x)?);
    let outputs = smoothed.model.trace(&x)?;
    for (i, output) in outputs.iter().enumerate() {
        let is_hidden = i + 1 < outputs.len();
        let active = output.gt(0f32)?.to_dtype(DType::F32)?.sum_all()?;
        let active = format!("ReLU, {} above 0", active.to_scalar::<f32>()?);
        let kind = if is_hidden { &active } else { "output" };
        let (layer, size) = (i + 2, sizes[i + 1]);
        say!("  layer {layer}, {size} values, {kind}: {}", show(output)?);
    }
    let logits = smoothed.model.forward(&x)?;
    let predicted = logits.argmax(D::Minus1)?.to_vec1::<u32>()?[0] as usize;
    let (softened, probabilities) =
        (smooth_targets(&y, classes, &smoothing)?, softmax(&logits, D::Minus1)?);
    say!("  softmax        {}", show(&probabilities)?);
    say!("  smoothed label {}", show(&softened)?);
    say!("  predicted {predicted}, labelled {target}: {}", verdict(predicted == target));
    let row_loss = loss.forward(&logits, &y)?.to_scalar::<f32>()?;
    say!("  loss of this row: {row_loss:.3} (at best {min_loss:.3})");

    say!("\n{}", heading("Key insight, measured"));
    // Both trainings use the same initial weights and batches; only the targets differ.
    let unsmoothed_loss = LabelSmoothingLoss::new(Smoothing::none());
    bar.reset();
    let unsmoothed = train(&args, &sizes, &split, &unsmoothed_loss, &bar)?;
    bar.finish_and_clear();
    say!("  on the test rows           | smoothed | not smoothed");
    for (i, name) in METRICS.iter().enumerate() {
        say!("  {name:26} | {:8.3} | {:12.3}", smoothed.metrics[i], unsmoothed.metrics[i]);
    }
    say!("  (calibration error over {BINS} bins of equal width)");
    say!("  {}", conclude(smoothed.metrics, unsmoothed.metrics));
    if let Some(picture) = picture {
        picture.draw([&smoothed, &unsmoothed])?;
    }
    Ok(())
}
