//! The network, its training and its evaluation.

use anyhow::{Result, ensure};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_label_smoothing::LabelSmoothingLoss;
use candle_nn::{Linear, Module, Optimizer, SGD, ops::softmax};
use indicatif::ProgressBar;
use rand::seq::SliceRandom;
use rand_distr::{Distribution, Normal};
use std::f64::consts::SQRT_2;

use crate::table::Split;
use crate::{Args, Stream, rng};

/// Scales the initial weights of the output layer. Large weights make the first predictions confident, so that the loss
/// starts above ln K, the loss of uniform probabilities.
const OUTPUT_SCALE: f64 = 2.;
/// The fraction of the training during which the learning rate rises to its peak. Afterwards it falls to zero.
const WARM_UP: f64 = 1. / 3.;
/// The number of calibration bins.
pub const BINS: usize = 10;

/// A trained network, the trace of its training, and its METRICS and calibration bins on the test rows.
pub struct Run {
    pub model: Mlp,
    pub trace: Vec<Epoch>,
    pub metrics: [f64; 3],
    pub bins: [Bin; BINS],
}

/// The means over the training batches of one epoch, and over the test rows after it.
pub struct Epoch {
    pub loss: f64,
    pub accuracy: f64,
    pub test_loss: f64,
    pub test_accuracy: f64,
}

/// Sums over the test rows whose top probability lies in this bin.
#[derive(Clone, Copy, Default)]
pub struct Bin {
    pub rows: f64,
    pub confidence: f64,
    pub correct: f64,
}

/// Linear layers with ReLU between them.
pub struct Mlp {
    layers: Vec<Linear>,
}

impl Mlp {
    /// Returns the network and its variables. The initial weights are drawn here, since candle cannot seed its generator
    /// on the CPU. Before a ReLU, their standard deviation is sqrt(2/inputs), as in He's initialization.
    fn new(sizes: &[usize], seed: u64, device: &Device) -> Result<(Self, Vec<Var>)> {
        let mut rng = rng(seed, Stream::Weights);
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
    pub fn trace(&self, x: &Tensor) -> candle_core::Result<Vec<Tensor>> {
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

pub fn train(
    args: &Args,
    sizes: &[usize],
    split: &Split,
    loss: &LabelSmoothingLoss,
    bar: &ProgressBar,
) -> Result<Run> {
    let (x_train, y_train) = &split.training;
    let (x_test, y_test) = &split.test;
    let (model, variables) = Mlp::new(sizes, args.seed, x_train.device())?;
    let mut optimizer = SGD::new(variables, args.lr)?;
    let mut rng = rng(args.seed, Stream::Batches);
    let mut order: Vec<u32> = (0..x_train.dim(0)? as u32).collect();
    let (mut trace, mut step) = (Vec::new(), 0.);
    for epoch in 1..=args.epochs {
        order.shuffle(&mut rng);
        let (mut losses, mut accuracies) = (0., 0.);
        let batches = order.chunks(args.batch_size as usize);
        let num_batches = batches.len() as f64;
        for batch in batches {
            let batch = Tensor::new(batch, x_train.device())?;
            let (x, y) = (x_train.index_select(&batch, 0)?, y_train.index_select(&batch, 0)?);
            let logits = model.forward(&x)?;
            let loss = loss.forward(&logits, &y)?;
            step += 1.;
            let progress = step / (num_batches * f64::from(args.epochs) + 1.);
            let lr_scale = f64::min(progress / WARM_UP, (1. - progress) / (1. - WARM_UP));
            optimizer.set_learning_rate(args.lr * lr_scale);
            optimizer.backward_step(&loss)?;
            losses += f64::from(loss.to_scalar::<f32>()?);
            accuracies += accuracy(&logits, &y)?;
            bar.inc(1);
        }
        let (train_loss, train_accuracy) = (losses / num_batches, accuracies / num_batches);
        let logits = model.forward(x_test)?;
        let test_loss = f64::from(loss.forward(&logits, y_test)?.to_scalar::<f32>()?);
        for loss in [train_loss, test_loss] {
            ensure!(
                loss.is_finite(),
                "the loss is {loss} in epoch {epoch}: --lr {} is too large",
                args.lr
            );
        }
        let test_accuracy = accuracy(&logits, y_test)?;
        trace.push(Epoch { loss: train_loss, accuracy: train_accuracy, test_loss, test_accuracy });
        bar.set_message(format!("loss {train_loss:.3}"));
    }
    let (metrics, bins) = evaluate(&model, x_test, y_test)?;
    Ok(Run { model, trace, metrics, bins })
}

fn accuracy(logits: &Tensor, y: &Tensor) -> Result<f64> {
    let correct = logits.argmax(D::Minus1)?.eq(y)?.to_dtype(DType::F32)?;
    Ok(f64::from(correct.mean_all()?.to_scalar::<f32>()?))
}

/// The METRICS and the calibration bins of a model.
fn evaluate(model: &Mlp, x: &Tensor, y: &Tensor) -> Result<([f64; 3], [Bin; BINS])> {
    let logits = model.forward(x)?;
    let top = softmax(&logits, D::Minus1)?.max(D::Minus1)?;
    let correct = logits.argmax(D::Minus1)?.eq(y)?.to_vec1::<u8>()?;
    let (rows, mut bins) = (correct.len() as f64, [Bin::default(); BINS]);
    for (top, correct) in top.to_vec1::<f32>()?.into_iter().map(f64::from).zip(correct) {
        let bin = &mut bins[((top * BINS as f64) as usize).min(BINS - 1)];
        bin.rows += 1.;
        bin.confidence += top;
        bin.correct += f64::from(correct);
    }
    let confidence = bins.iter().map(|bin| bin.confidence).sum::<f64>() / rows;
    // The gap between confidence and accuracy in each bin, weighted by the rows in it.
    let gaps = bins.iter().map(|bin| (bin.confidence - bin.correct).abs());
    let calibration_error = gaps.sum::<f64>() / rows;
    Ok(([accuracy(&logits, y)?, confidence, calibration_error], bins))
}
