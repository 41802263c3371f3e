//! A convolutional network learns handwritten digits, with label smoothing and without.
//!
//! It shows the loss in a training loop of candle-nn, and the accuracy and the confidence from `forward_with_metrics`.
//! `cargo run --release --example image_classifier` runs it, in a clone of the repository: the package has no data.
//!
//! It takes about 5 seconds on two cores. On the held-out digits, the last fifth of the rows, the accuracy is 0.84 with smoothing
//! and 0.86 without; over six seeds the mean is 0.88 with both. The mean confidence is 0.74 with smoothing and 0.93 without:
//! with smoothing it is lower than the accuracy, and without it is higher.

#[path = "common/digits.rs"]
mod digits;
#[path = "common/weights.rs"]
mod weights;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_label_smoothing::{LabelSmoothingLoss, Smoothing};
use candle_nn::{AdamW, Conv2d, Conv2dConfig, Linear, Module, Optimizer, ParamsAdamW};
use candle_nn::{VarBuilder, VarMap, conv2d, linear};
use clap::{Parser, value_parser};
use digits::{Digits, NUM_CLASSES, read_digits};
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use std::path::PathBuf;
use weights::seed_weights;

const BATCH_SIZE: usize = 32;

/// Trains a convolutional network on digits of 8 x 8 pixels, with label smoothing and without.
#[derive(Parser)]
#[command(allow_negative_numbers = true)]
struct Args {
    /// The digits: rows of 64 pixels and a label
    #[arg(long, value_name = "FILE.csv", default_value = "examples/calibration/data/digits.csv")]
    data: PathBuf,
    /// Passes over the training rows
    #[arg(long, default_value_t = 15, value_parser = value_parser!(u32).range(1..=10_000))]
    epochs: u32,
    /// Share of each target that is spread over all classes, from 0 to 1
    #[arg(long, default_value_t = 0.1)]
    epsilon: f64,
    /// Seed of the weights and of the order of the rows
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

struct Network {
    convolutions: [Conv2d; 2],
    head: Linear,
}

impl Network {
    fn new(vb: VarBuilder) -> candle_core::Result<Self> {
        let same_size = Conv2dConfig { padding: 1, ..Default::default() };
        Ok(Self {
            convolutions: [
                conv2d(1, 8, 3, same_size, vb.pp("conv1"))?,
                conv2d(8, 16, 3, same_size, vb.pp("conv2"))?,
            ],
            head: linear(16 * 2 * 2, NUM_CLASSES, vb.pp("head"))?,
        })
    }
}

impl Module for Network {
    /// Images, (batch, 1, 8, 8), to logits, (batch, 10).
    fn forward(&self, images: &Tensor) -> candle_core::Result<Tensor> {
        let mut x = images.clone();
        for convolution in &self.convolutions {
            x = convolution.forward(&x)?.relu()?.max_pool2d(2)?;
        }
        self.head.forward(&x.flatten_from(1)?)
    }
}

/// Trains a network, and prints the loss and the accuracy of each fifth of the epochs.
fn train(data: &Digits, loss: &LabelSmoothingLoss, args: &Args) -> Result<Network> {
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let variables = VarMap::new();
    let network = Network::new(VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
    seed_weights(&variables, &mut rng)?;
    let params = ParamsAdamW { lr: 1e-2, ..Default::default() };
    let mut optimizer = AdamW::new(variables.all_vars(), params)?;
    let mut order: Vec<u32> = (0..data.labels.dim(0)? as u32).collect();
    for epoch in 1..=args.epochs {
        order.shuffle(&mut rng);
        let (mut loss_sum, mut correct) = (0., 0.);
        for rows in order.chunks(BATCH_SIZE) {
            let (images, labels) = data.batch(rows)?;
            let (loss, metrics) = loss.forward_with_metrics(&network.forward(&images)?, &labels)?;
            optimizer.backward_step(&loss)?;
            loss_sum += loss.to_scalar::<f32>()? * rows.len() as f32;
            correct += metrics.correct.sum_all()?.to_scalar::<f32>()?;
        }
        if epoch % args.epochs.div_ceil(5) == 0 || epoch == args.epochs {
            let count = order.len() as f32;
            let (loss, accuracy) = (loss_sum / count, correct / count);
            println!("  epoch {epoch:2}: loss {loss:.3}, accuracy {accuracy:.3}");
        }
    }
    Ok(network)
}

fn main() -> Result<()> {
    let args = Args::parse();
    let [training, held_out] = read_digits(&args.data)?;
    println!(
        "{} digits to train on, {} held out",
        training.labels.dim(0)?,
        held_out.labels.dim(0)?
    );
    for (name, smoothing) in [
        ("with smoothing", Smoothing::over_all(args.epsilon).context("--epsilon cannot be used")?),
        ("without", Smoothing::none()),
    ] {
        println!("{name}");
        let loss = LabelSmoothingLoss::new(smoothing);
        let network = train(&training, &loss, &args)?;
        let logits = network.forward(&held_out.images)?;
        let (_, metrics) = loss.forward_with_metrics(&logits, &held_out.labels)?;
        let accuracy = metrics.accuracy()?.to_scalar::<f32>()?;
        let confidence = metrics.mean_confidence()?.to_scalar::<f32>()?;
        let nll = metrics.mean_nll()?.to_scalar::<f32>()?;
        println!("  held out: accuracy {accuracy:.3}, confidence {confidence:.3}, nll {nll:.3}");
    }
    Ok(())
}
