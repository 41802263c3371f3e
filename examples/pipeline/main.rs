//! A small classifier from raw rows to calibrated probabilities, in the order in which one writes it.
//! Run `cargo run --example pipeline`, or `cargo run --example pipeline -- --help` for the options.

mod report;
mod table;

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Smoothing, smooth_targets};
use candle_nn::{Linear, Module, Optimizer, SGD, ops::softmax};
use clap::{Parser, ValueEnum, value_parser};
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};
use report::{Epoch, QUALITIES, conclude, observe, print_chart, show};
use std::f64::consts::SQRT_2;
use std::path::PathBuf;
use table::{generate, read_csv, statistics, tensors};

/// The output layer starts this much larger than usual: confident before it knows anything, so that
/// the trace begins above ln K, the loss of a guess.
const OUTPUT_SCALE: f64 = 2.;
/// The part of the training over which the learning rate grows to its peak; then it falls to zero.
const WARM_UP: f64 = 1. / 3.;
const BINS: usize = 10;

/// Trains a multilayer perceptron with label smoothing, and once more without it to compare.
#[derive(Parser)]
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
    /// Where to compute; cuda and metal need the feature of the same name
    #[arg(long, value_enum, default_value_t = On::Cpu)]
    device: On,
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
enum On {
    Cpu,
    Cuda,
    Metal,
}

/// What a seed is used for. Each use has a stream of its own, so that changing one (more epochs, another
/// network) leaves the others as they were.
#[derive(Clone, Copy)]
enum Use {
    Rows,
    Split,
    Weights,
    Batches,
}

fn rng(seed: u64, purpose: Use) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(purpose as u64);
    rng
}

fn main() -> Result<()> {
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
        On::Cpu => Ok(Device::Cpu),
        On::Cuda => Device::new_cuda(0),
        On::Metal => Device::new_metal(0),
    }
    .context("--device cannot be used; cuda and metal need `--features` of the same name")?;

    println!("Raw data input");
    let table = match &args.data {
        Some(path) => read_csv(path).with_context(|| format!("cannot use {}", path.display()))?,
        None => generate(args.seed),
    };
    let (rows, columns, classes) = (table.rows.len(), table.rows[0].len(), table.classes.len());
    println!("  {rows} rows x {columns} columns, {classes} classes");
    let names = table.classes.iter().enumerate();
    let names: Vec<_> = names.map(|(i, name)| format!("{i} = {name}")).collect();
    println!("  classes: {}", names.join(", "));
    println!("  first row {:?}, class {}\n", table.rows[0], table.labels[0]);

    println!("Train/test split");
    let mut order: Vec<usize> = (0..rows).collect();
    order.shuffle(&mut rng(args.seed, Use::Split));
    let (train, test) = order.split_at(rows - rows / 5);
    println!("  training {} x {columns}", train.len());
    println!("  test     {} x {columns}", test.len());
    // Features in different units would need weights of different sizes. What the test rows look
    // like is not known at this point, so the training rows alone set the scale.
    let scale = statistics(&table, train);
    let (x_train, y_train) = tensors(&table, train, &scale, &device)?;
    let (x_test, y_test) = tensors(&table, test, &scale, &device)?;

    println!("\nLabel smoothing applied");
    let soft = smooth_targets(&y_train, classes, &smoothing)?;
    println!("  soft targets {} x {}", soft.dim(0)?, soft.dim(1)?);
    let soft = soft.to_vec2::<f32>()?;
    // A small file may have no row of class 1 among its training rows.
    let example = train.iter().position(|&row| table.labels[row] == 1);
    let example = example.unwrap_or(0);
    let label = table.labels[train[example]];
    let hard: Vec<u32> = (0..classes as u32).map(|k| (k == label) as u32).collect();
    let values = &table.rows[train[example]];
    println!("  first training row of class {label}: {values:.2?}");
    println!("  hard label {hard:?}");
    println!("  soft label {:?}", soft[example]);
    // No prediction has a lower loss than the soft label itself, and that is its entropy.
    let terms = soft[example].iter().filter(|&&q| q > 0.);
    let floor: f64 = terms.map(|&q| -f64::from(q) * f64::from(q).ln()).sum();

    println!("\nModel training");
    let mut sizes = vec![columns];
    sizes.extend(args.hidden.iter().map(|&size| size as usize));
    sizes.push(classes);
    println!("  layer sizes {sizes:?}, ReLU between them");
    println!("  SGD, learning rate up to {lr}, batches of {}", args.batch_size);
    let loss = LabelSmoothingLoss::new(smoothing.clone());
    let (model, trace) = train_model(&args, &sizes, &x_train, &y_train, &loss)?;
    println!("\nTraining trace");
    println!("  epoch |   loss | accuracy | observation");
    for (i, epoch) in trace.iter().enumerate() {
        let (loss, accuracy) = (epoch.loss, epoch.accuracy);
        let observation = observe(&trace[..=i], classes, floor);
        let number = i + 1;
        println!("  {number:5} | {loss:6.3} | {accuracy:8.3} | {observation}");
    }
    let smoothed = quality(&model, &x_test, &y_test)?;
    let gap = smoothed[0] - trace.last().map_or(0., |epoch| epoch.accuracy);
    println!("  accuracy on the test rows: {:.3}", smoothed[0]);
    println!("  ({gap:+.3} against the training rows of the last epoch)\n");
    print_chart(&trace);

    println!("\nPrediction trace");
    let (x, y) = (x_test.narrow(0, 0, 1)?, y_test.narrow(0, 0, 1)?);
    let target = table.labels[test[0]] as usize;
    println!("  the first test row, label {target}");
    println!("  layer 1, {columns} values, input: {}", show(&x)?);
    let outputs = model.trace(&x)?;
    for (i, output) in outputs.iter().enumerate() {
        let is_hidden = i + 1 < outputs.len();
        let active = output.gt(0f32)?.to_dtype(DType::F32)?.sum_all()?;
        let active = format!("ReLU, {} above 0", active.to_scalar::<f32>()?);
        let kind = if is_hidden { &active } else { "output" };
        let (layer, size) = (i + 2, sizes[i + 1]);
        println!("  layer {layer}, {size} values, {kind}: {}", show(output)?);
    }
    let logits = model.forward(&x)?;
    let predicted = logits.argmax(D::Minus1)?.to_vec1::<u32>()?[0] as usize;
    let verdict = ["wrong", "right"][(predicted == target) as usize];
    let (softened, probabilities) =
        (smooth_targets(&y, classes, &smoothing)?, softmax(&logits, D::Minus1)?);
    println!("  softmax        {}", show(&probabilities)?);
    println!("  smoothed label {}", show(&softened)?);
    println!("  predicted {predicted}, labelled {target}: {verdict}");
    let own = loss.forward(&logits, &y)?.to_scalar::<f32>()?;
    println!("  loss of this row: {own:.3} (at best {floor:.3})");

    println!("\nKey insight, measured");
    // The same initial weights and the same batches: only the targets differ.
    let plain = LabelSmoothingLoss::new(Smoothing::none());
    let (model, _) = train_model(&args, &sizes, &x_train, &y_train, &plain)?;
    let hard = quality(&model, &x_test, &y_test)?;
    println!("  on the test rows           | smoothed | not smoothed");
    for (i, name) in QUALITIES.iter().enumerate() {
        println!("  {name:26} | {:8.3} | {:12.3}", smoothed[i], hard[i]);
    }
    println!("  (calibration error over {BINS} bins of equal width)");
    println!("  {}", conclude(smoothed, hard));
    Ok(())
}

/// Linear layers with ReLU between them.
struct Mlp {
    layers: Vec<Linear>,
}

impl Mlp {
    /// The network and its variables. candle cannot seed its generator on the CPU, so the initial
    /// weights are drawn here: He's deviation sqrt(2/inputs) for what goes through a ReLU.
    fn new(sizes: &[usize], seed: u64, device: &Device) -> Result<(Self, Vec<Var>)> {
        let mut rng = rng(seed, Use::Weights);
        let (mut layers, mut variables) = (Vec::new(), Vec::new());
        for (i, size) in sizes.windows(2).enumerate() {
            let (inputs, outputs) = (size[0], size[1]);
            let is_hidden = i + 2 < sizes.len();
            let gain = if is_hidden { SQRT_2 } else { OUTPUT_SCALE };
            let normal = Normal::new(0., gain / (inputs as f64).sqrt())?;
            let draw = |_| normal.sample(&mut rng) as f32;
            let weight: Vec<f32> = (0..inputs * outputs).map(draw).collect();
            let weight = Var::from_vec(weight, (outputs, inputs), device)?;
            let bias = Var::zeros(outputs, DType::F32, device)?;
            let bias_tensor = bias.as_tensor().clone();
            layers.push(Linear::new(weight.as_tensor().clone(), Some(bias_tensor)));
            variables.extend([weight, bias]);
        }
        Ok((Self { layers }, variables))
    }

    /// The output of every layer.
    fn trace(&self, x: &Tensor) -> candle_core::Result<Vec<Tensor>> {
        let mut outputs: Vec<Tensor> = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            let output = layer.forward(outputs.last().unwrap_or(x))?;
            let is_hidden = i + 1 < self.layers.len();
            outputs.push(if is_hidden { output.relu()? } else { output });
        }
        Ok(outputs)
    }
}

impl Module for Mlp {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.trace(x)?.pop().unwrap_or_else(|| x.clone()))
    }
}

fn train_model(
    args: &Args,
    sizes: &[usize],
    x: &Tensor,
    y: &Tensor,
    loss: &LabelSmoothingLoss,
) -> Result<(Mlp, Vec<Epoch>)> {
    let (model, variables) = Mlp::new(sizes, args.seed, x.device())?;
    let mut optimizer = SGD::new(variables, args.lr)?;
    let mut rng = rng(args.seed, Use::Batches);
    let mut order: Vec<u32> = (0..x.dim(0)? as u32).collect();
    let (mut trace, mut step) = (Vec::new(), 0.);
    for epoch in 1..=args.epochs {
        order.shuffle(&mut rng);
        let (mut losses, mut accuracies) = (0., 0.);
        let batches = order.chunks(args.batch_size as usize);
        let count = batches.len() as f64;
        for batch in batches {
            let batch = Tensor::new(batch, x.device())?;
            let (x, y) = (x.index_select(&batch, 0)?, y.index_select(&batch, 0)?);
            let logits = model.forward(&x)?;
            let loss = loss.forward(&logits, &y)?;
            step += 1.;
            let part = step / (count * f64::from(args.epochs) + 1.);
            let share = f64::min(part / WARM_UP, (1. - part) / (1. - WARM_UP));
            optimizer.set_learning_rate(args.lr * share);
            optimizer.backward_step(&loss)?;
            losses += f64::from(loss.to_scalar::<f32>()?);
            accuracies += accuracy(&logits, &y)?;
        }
        let (loss, accuracy) = (losses / count, accuracies / count);
        ensure!(
            loss.is_finite(),
            "the loss is {loss} in epoch {epoch}: --lr {} is too large",
            args.lr
        );
        trace.push(Epoch { loss, accuracy });
    }
    Ok((model, trace))
}

fn accuracy(logits: &Tensor, y: &Tensor) -> Result<f64> {
    let right = logits.argmax(D::Minus1)?.eq(y)?.to_dtype(DType::F32)?;
    Ok(f64::from(right.mean_all()?.to_scalar::<f32>()?))
}

/// The QUALITIES of a model: how often it is right, how sure it is of that, and how far the two differ.
fn quality(model: &Mlp, x: &Tensor, y: &Tensor) -> Result<[f64; 3]> {
    let logits = model.forward(x)?;
    let top = softmax(&logits, D::Minus1)?.max(D::Minus1)?;
    let right = logits.argmax(D::Minus1)?.eq(y)?.to_vec1::<u8>()?;
    let (rows, mut confidence, mut gaps) = (right.len() as f64, 0., [0f64; BINS]);
    for (top, right) in top.to_vec1::<f32>()?.into_iter().map(f64::from).zip(right) {
        confidence += top / rows;
        gaps[((top * BINS as f64) as usize).min(BINS - 1)] += (top - f64::from(right)) / rows;
    }
    // The gap between confidence and accuracy in each bin, weighted by the rows in it.
    let calibration_error = gaps.iter().map(|gap| gap.abs()).sum();
    Ok([accuracy(&logits, y)?, confidence, calibration_error])
}
