//! Label smoothing from raw rows to predictions: trains a small classifier on smoothed labels, and the same network on hard
//! labels. `cargo run --example pipeline` runs it; `cargo run --example pipeline -- --help` lists the options.

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Smoothing, smooth_targets};
use candle_nn::{Linear, Module, Optimizer, SGD, Sequential, encoding::one_hot, ops::softmax, seq};
use clap::{Parser, value_parser};
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal, StandardNormal};
use std::io::{self, Write};

const FIRST_ROW: [f64; 10] = [5.1, 3.5, 1.4, 0.9, 2.8, 4.2, 1.3, 3.1, 1.6, 0.2];
const NUM_CLASSES: usize = 3;

/// Trains a small classifier with label smoothing, and once more without it to compare.
#[derive(Parser)]
#[command(allow_negative_numbers = true)]
struct Args {
    /// Seed of the rows, the split, the initial weights and the order of the batches
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Share of each target that is spread over classes, from 0 to 1
    #[arg(long, default_value_t = 0.1)]
    epsilon: f64,
    /// Classes that share epsilon: those other than the label, all (as in PyTorch), or none (hard labels)
    #[arg(long, default_value = "others", value_parser = ["others", "all", "none"])]
    convention: String,
    /// Passes over the training rows
    #[arg(long, default_value_t = 5, value_parser = value_parser!(u32).range(1..=100_000))]
    epochs: u32,
    /// Device to compute on; cuda and metal need the feature of the same name
    #[arg(long, default_value = "cpu", value_parser = ["cpu", "cuda", "metal"])]
    device: String,
}

fn main() -> Result<()> {
    accept_closed_pipe(run(&Args::parse(), &mut io::stdout()))
}

fn run(args: &Args, out: &mut impl Write) -> Result<()> {
    let smoothing = match args.convention.as_str() {
        "others" => Smoothing::over_others(args.epsilon),
        "all" => Smoothing::over_all(args.epsilon),
        _ => Smoothing::over_all(args.epsilon).map(|_| Smoothing::none()),
    }
    .context("--epsilon cannot be used")?;
    let device = match args.device.as_str() {
        "cuda" => Device::new_cuda(0),
        "metal" => Device::new_metal(0),
        _ => Ok(Device::Cpu),
    }
    .context("--device cannot be used; is the feature of this name enabled?")?;

    writeln!(out, "Raw data input")?;
    let (x, y) = generate(args.seed)?;
    let (num_rows, num_columns) = x.dims2()?;
    writeln!(out, "  {num_rows} rows x {num_columns} columns, {NUM_CLASSES} classes")?;
    writeln!(out, "  first row {:?}", x.get(0)?.to_vec1::<f64>()?)?;

    writeln!(out, "\nTrain/test split")?;
    let [x_train, y_train, x_test, y_test] = split(&x, &y, args.seed, &device)?;
    let (num_train, num_test) = (x_train.dim(0)?, x_test.dim(0)?);
    writeln!(out, "  training {num_train} x {num_columns}, test {num_test} x {num_columns}")?;

    writeln!(out, "\nLabel smoothing applied")?;
    let soft = smooth_targets(&y_train, NUM_CLASSES, &smoothing)?;
    writeln!(out, "  soft targets {num_train} x {}, which the loss computes itself", soft.dim(1)?)?;
    let label = Tensor::new(1u32, &device)?;
    let soft_label = smooth_targets(&label, NUM_CLASSES, &smoothing)?.to_vec1::<f32>()?;
    let hard_label = one_hot(label, NUM_CLASSES, 1u8, 0)?.to_vec1::<u8>()?;
    writeln!(out, "  class 1: hard label {hard_label:?}, soft label {soft_label:?}")?;

    let (layer_sizes, lr, batch_size) = (vec![num_columns, 64, 64, NUM_CLASSES], 0.75, 16);
    writeln!(out, "\nModel training\n  layer sizes {layer_sizes:?}, ReLU between them")?;
    let config = Config { layer_sizes, lr, batch_size, epochs: args.epochs, seed: args.seed };
    let (network, trace) = train(&x_train, &y_train, &smoothing, &config)?;

    writeln!(out, "\nTraining trace\n  epoch |   loss | accuracy | observation")?;
    for (i, [loss, accuracy]) in trace.iter().enumerate() {
        let observation = match accuracy {
            ..0.5 => "less than half of the predictions are right",
            ..0.75 => "at least half of the predictions are right",
            _ => "at least three of four predictions are right",
        };
        writeln!(out, "  {:5} | {loss:6.3} | {accuracy:8.3} | {observation}", i + 1)?;
    }
    writeln!(out, "\n  epoch | loss, a star for each 0.025")?;
    for (i, [loss, _]) in trace.iter().enumerate() {
        writeln!(out, "  {:5} | {}", i + 1, "*".repeat((40. * loss) as usize))?;
    }

    let (x, y) = (x_test.narrow(0, 0, 1)?, y_test.narrow(0, 0, 1)?);
    writeln!(out, "\nPrediction trace of the first test row, class {:?}", y.to_vec1::<u32>()?)?;
    writeln!(out, "  layer 1, {num_columns} values, input: {}", show(&x)?)?;
    let outputs = network.forward_all(&x)?;
    for (i, output) in outputs.iter().enumerate() {
        let kind = if i + 1 < outputs.len() { "ReLU" } else { "output" };
        writeln!(out, "  layer {}, {} values, {kind}: {}", i + 2, output.dim(1)?, show(output)?)?;
    }
    let logits = network.forward(&x)?;
    writeln!(out, "  softmax        {}", show(&softmax(&logits, D::Minus1)?)?)?;
    writeln!(out, "  smoothed label {}", show(&smooth_targets(&y, NUM_CLASSES, &smoothing)?)?)?;
    let criterion = LabelSmoothingLoss::new(smoothing);
    let (loss, metrics) = criterion.forward_with_metrics(&logits, &y)?;
    writeln!(out, "  predicted class {:?}", metrics.prediction.to_vec1::<u32>()?)?;
    writeln!(out, "  loss of this row: {:.3}", scalar(&loss)?)?;

    writeln!(out, "\nKey insight, measured\n  on the test rows | accuracy | mean top probability")?;
    // The same network with the same initial weights and batches, trained on hard labels.
    let (hard_network, _) = train(&x_train, &y_train, &Smoothing::none(), &config)?;
    for (name, network) in [("smoothed", network), ("not smoothed", hard_network)] {
        let (_, metrics) = criterion.forward_with_metrics(&network.forward(&x_test)?, &y_test)?;
        let (accuracy, top) = (scalar(&metrics.accuracy()?)?, scalar(&metrics.mean_confidence()?)?);
        writeln!(out, "  {name:16} | {accuracy:8.3} | {top:20.3}")?;
    }
    writeln!(out, "  Smoothing lowers the top probability. The accuracies vary with the seed:")?;
    Ok(writeln!(out, "  the example `calibration` compares both over ten seeds.")?)
}

pub struct Config {
    pub layer_sizes: Vec<usize>,
    pub lr: f64,
    pub batch_size: usize,
    pub epochs: u32,
    pub seed: u64,
}

/// The network, and the mean loss and accuracy of each epoch's batches.
pub type Trained = (Sequential, Vec<[f64; 2]>);

/// Trains a network on features `x`, (rows, columns), and classes `y`, (rows).
pub fn train(x: &Tensor, y: &Tensor, smoothing: &Smoothing, config: &Config) -> Result<Trained> {
    let criterion = LabelSmoothingLoss::new(smoothing.clone());
    let (network, variables) = mlp(&config.layer_sizes, config.seed, x.device())?;
    let mut optimizer = SGD::new(variables, config.lr)?;
    let mut rng = rng(config.seed, 3);
    let mut order: Vec<u32> = (0..x.dim(0)? as u32).collect();
    let num_batches = order.len().div_ceil(config.batch_size) as f64;
    let (mut trace, mut step) = (Vec::new(), 0.);
    for _ in 0..config.epochs {
        order.shuffle(&mut rng);
        let (mut loss_sum, mut accuracy_sum) = (0., 0.);
        for batch in order.chunks(config.batch_size) {
            let batch = Tensor::new(batch, x.device())?;
            let (x, y) = (x.index_select(&batch, 0)?, y.index_select(&batch, 0)?);
            let (loss, metrics) = criterion.forward_with_metrics(&network.forward(&x)?, &y)?;
            // The learning rate rises during the first third of the steps, then it falls to 0.
            step += 1.;
            let progress = step / (num_batches * f64::from(config.epochs) + 1.);
            optimizer.set_learning_rate(config.lr * (3. * progress).min(1.5 - 1.5 * progress));
            optimizer.backward_step(&loss)?;
            loss_sum += scalar(&loss)?;
            accuracy_sum += scalar(&metrics.accuracy()?)?;
        }
        trace.push([loss_sum / num_batches, accuracy_sum / num_batches]);
    }
    Ok((network, trace))
}

/// Draws four fifths of the rows for training and standardizes the columns by the mean and variance of these rows. Returns the
/// features and the classes of the training rows, then those of the test rows.
pub fn split(x: &Tensor, y: &Tensor, seed: u64, device: &Device) -> Result<[Tensor; 4]> {
    let mut order: Vec<u32> = (0..x.dim(0)? as u32).collect();
    order.shuffle(&mut rng(seed, 1));
    let (train, test) = order.split_at(order.len() - order.len() / 5);
    let (train, test) = (Tensor::new(train, x.device())?, Tensor::new(test, x.device())?);
    let x_train = x.index_select(&train, 0)?;
    let (mean, deviation) = (x_train.mean_keepdim(0)?, x_train.var_keepdim(0)?.sqrt()?);
    // A column that is constant in the training rows is divided by 1.
    let constant = deviation.le(&(mean.abs()? * 1e-12)?)?.to_dtype(DType::F64)?;
    let x =
        x.broadcast_sub(&mean)?.broadcast_div(&(deviation + constant)?)?.to_dtype(DType::F32)?;
    let select = |tensor: &Tensor, rows| tensor.index_select(rows, 0)?.to_device(device);
    Ok([select(&x, &train)?, select(y, &train)?, select(&x, &test)?, select(y, &test)?])
}

/// Generates features, (1000, 10), and classes, (1000). The first row is `FIRST_ROW`. In the others two columns are higher, and
/// this pair decides the class; the columns j with j % 3 equal to the class are a little higher. The seed changes only the noise.
pub fn generate(seed: u64) -> Result<(Tensor, Tensor)> {
    let mut rng = rng(seed, 0);
    let (mut x, mut y) = (Vec::new(), Vec::new());
    let pairs = (0..10).flat_map(|first| (0..first).map(move |second| [first, second]));
    for pair in pairs.cycle().take(1000) {
        let class = pair.iter().sum::<usize>() % NUM_CLASSES;
        for (j, value) in FIRST_ROW.iter().enumerate() {
            let noise: f64 = StandardNormal.sample(&mut rng);
            let pair_shift = if pair.contains(&j) { 2.1 } else { 0. };
            let class_shift = if j % NUM_CLASSES == class { 0.7 } else { 0. };
            x.push(value + 0.3 * (pair_shift + class_shift + noise));
        }
        y.push(class as u32);
    }
    x.splice(..10, FIRST_ROW);
    Ok((Tensor::from_vec(x, (1000, 10), &Device::Cpu)?, Tensor::new(y, &Device::Cpu)?))
}

/// A multilayer perceptron and its variables. The initial weights are drawn here, since candle cannot seed its generator on the
/// CPU.
fn mlp(sizes: &[usize], seed: u64, device: &Device) -> Result<(Sequential, Vec<Var>)> {
    let mut rng = rng(seed, 2);
    let (mut network, mut variables) = (seq(), Vec::new());
    for (i, (&inputs, &outputs)) in sizes.iter().zip(&sizes[1..]).enumerate() {
        let is_hidden = i + 2 < sizes.len();
        // 2 is He's initialization. 4 makes the first epoch's loss that of the tutorial, about 1.2.
        let variance = if is_hidden { 2. } else { 4. } / inputs as f64;
        let normal = Normal::new(0., variance.sqrt())?;
        let weight = (0..inputs * outputs).map(|_| normal.sample(&mut rng) as f32).collect();
        let weight = Var::from_vec(weight, (outputs, inputs), device)?;
        let bias = Var::zeros(outputs, DType::F32, device)?;
        let layer = Linear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone()));
        network = match is_hidden {
            true => network.add_fn(move |x| layer.forward(x)?.relu()),
            false => network.add(layer),
        };
        variables.extend([weight, bias]);
    }
    Ok((network, variables))
}

/// Each purpose has its own stream of random numbers, so that a change to one does not change the others.
fn rng(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    rng
}

pub fn scalar(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.to_scalar::<f32>()?.into())
}

/// Formats the first values of a row.
fn show(row: &Tensor) -> Result<String> {
    let values = row.flatten_all()?.to_vec1::<f32>()?;
    let shown: Vec<_> = values.iter().take(10).map(|value| format!("{value:.2}")).collect();
    Ok(format!("[{}{}]", shown.join(", "), if values.len() > 10 { ", ..." } else { "" }))
}

/// A reader of the output, such as `head`, may close the pipe.
pub fn accept_closed_pipe(result: Result<()>) -> Result<()> {
    let is_closed = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
    let ends_early = result.as_ref().is_err_and(|e| e.downcast_ref().is_some_and(is_closed));
    if ends_early { Ok(()) } else { result }
}
