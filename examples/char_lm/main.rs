//! Trains a character-level language model with `forward_linear`, which computes the loss from the hidden states.
//!
//! `cargo run --release --example char_lm` runs it; `-- --help` lists the options. The text is the first fourteen
//! chapters of Jane Austen's *Northanger Abbey* (1817), which is in the public domain. `--data` takes another text.
//!
//! Characters are few classes, so their logits would also fit into memory. A model of words has tens of thousands of
//! classes; there, the same call saves the memory of the logits.

#[path = "../common/weights.rs"]
mod weights;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, IndexOp, Tensor};
use candle_label_smoothing::{LabelSmoothingLoss, Smoothing};
use candle_nn::rnn::{GRU, GRUConfig, RNN, gru};
use candle_nn::{AdamW, Embedding, Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use candle_nn::{embedding, linear, ops::softmax_last_dim};
use clap::{Parser, value_parser};
use indicatif::{ProgressBar, ProgressStyle};
use peak_alloc::PeakAlloc;
use rand::distr::{Distribution, weighted::WeightedIndex};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::f64::consts::LN_2;
use std::path::PathBuf;
use std::time::Instant;
use weights::seed_weights;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const TEXT: &str = include_str!("northanger_abbey.txt");
/// Below 1, sampling prefers likely characters more strongly.
const TEMPERATURE: f64 = 0.7;

/// Trains a recurrent network to predict the next character, and lets it write.
#[derive(Parser)]
struct Args {
    /// The text to learn from [default: fourteen chapters of Northanger Abbey]
    #[arg(long, value_name = "FILE.txt")]
    data: Option<PathBuf>,
    /// Steps of the optimizer
    #[arg(long, default_value_t = 600, value_parser = value_parser!(u32).range(1..))]
    steps: u32,
    /// Passages in one step
    #[arg(long, default_value_t = 32, value_parser = value_parser!(u32).range(1..=4096))]
    batch_size: u32,
    /// Characters of a passage
    #[arg(long, default_value_t = 64, value_parser = value_parser!(u32).range(1..=4096))]
    length: u32,
    /// Units of the hidden layer
    #[arg(long, default_value_t = 256, value_parser = value_parser!(u32).range(1..=4096))]
    hidden: u32,
    /// Learning rate
    #[arg(long, default_value_t = 1e-2)]
    lr: f64,
    /// How much of each target is spread over all characters, as often as they occur, from 0 to 1
    #[arg(long, default_value_t = 0.02)]
    epsilon: f64,
    /// Characters to write at the end
    #[arg(long, default_value_t = 400)]
    sample: usize,
    /// Seed of the weights, the passages and the sample
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

struct Model {
    embedding: Embedding,
    gru: GRU,
    head: Linear,
}

impl Model {
    fn new(num_characters: usize, hidden_size: usize, vb: VarBuilder) -> candle_core::Result<Self> {
        Ok(Self {
            embedding: embedding(num_characters, hidden_size / 4 + 1, vb.pp("embedding"))?,
            gru: gru(hidden_size / 4 + 1, hidden_size, GRUConfig::default(), vb.pp("gru"))?,
            head: linear(hidden_size, num_characters, vb.pp("head"))?,
        })
    }

    /// The hidden state after each character: (batch, length) to (batch, length, hidden).
    fn hidden_states(&self, characters: &Tensor) -> candle_core::Result<Tensor> {
        let states = self.gru.seq(&self.embedding.forward(characters)?)?;
        Tensor::stack(&states.iter().map(|state| state.h()).collect::<Vec<_>>(), 1)
    }
}

/// The passages of `length` characters at `starts`, and their targets, which are one character later. Both have the shape
/// (passages, length).
fn passages(text: &[u32], starts: &[usize], length: usize) -> Result<(Tensor, Tensor)> {
    let tensor = |shift: usize| {
        let characters = starts.iter().flat_map(|start| &text[start + shift..][..length]);
        let characters: Vec<u32> = characters.copied().collect();
        Tensor::from_vec(characters, (starts.len(), length), &Device::Cpu)
    };
    Ok((tensor(0)?, tensor(1)?))
}

/// The cross-entropy of `text` in bits per character, without smoothing.
fn bits(model: &Model, loss: &LabelSmoothingLoss, text: &[u32], length: usize) -> Result<f64> {
    let starts: Vec<usize> = (0..text.len() - length).step_by(length).collect();
    let (weight, bias) = (model.head.weight(), model.head.bias());
    let mut sum = 0.;
    for starts in starts.chunks(64) {
        let (x, y) = passages(text, starts, length)?;
        let hidden = model.hidden_states(&x)?;
        let (_, metrics) = loss.forward_linear_with_metrics(&hidden, weight, bias, &y)?;
        sum += f64::from(metrics.mean_nll()?.to_scalar::<f32>()?) * starts.len() as f64;
    }
    Ok(sum / LN_2 / starts.len() as f64)
}

/// Samples `len` characters that follow `prompt`.
fn generate(
    model: &Model,
    alphabet: &[char],
    prompt: u32,
    len: usize,
    rng: &mut ChaCha8Rng,
) -> Result<String> {
    let mut state = model.gru.zero_state(1)?;
    let (mut text, mut last) = (String::new(), prompt);
    for _ in 0..len {
        let input = model.embedding.forward(&Tensor::new(&[last], &Device::Cpu)?)?;
        state = model.gru.step(&input, &state)?;
        let logits = (model.head.forward(state.h())? / TEMPERATURE)?;
        let probabilities = softmax_last_dim(&logits)?.i(0)?.to_vec1::<f32>()?;
        last = WeightedIndex::new(&probabilities)?.sample(rng) as u32;
        text.push(alphabet[last as usize]);
    }
    Ok(text)
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.lr > 0. && args.lr.is_finite(), "--lr is {}, expected more than 0", args.lr);
    let text = match &args.data {
        Some(path) => std::fs::read_to_string(path)
            .with_context(|| format!("cannot use {}", path.display()))?,
        None => TEXT.to_string(),
    };
    let mut alphabet: Vec<char> = text.chars().collect();
    alphabet.sort_unstable();
    alphabet.dedup();
    let text: Vec<u32> = text
        .chars()
        .map(|character| alphabet.partition_point(|known| *known < character) as u32)
        .collect();
    let length = args.length as usize;
    let (training, held_out) = text.split_at(text.len() / 10 * 9);
    ensure!(
        held_out.len() > length,
        "the text has {} characters, expected more than {}: ten passages and one character",
        text.len(),
        10 * length + 10,
    );
    println!("{} characters, {} of them different", text.len(), alphabet.len());

    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let variables = VarMap::new();
    let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
    let model = Model::new(alphabet.len(), args.hidden as usize, vb)?;
    seed_weights(&variables, &mut rng)?;
    let parameters = variables.all_vars().iter().map(|var| var.elem_count()).sum::<usize>();
    println!("{parameters} parameters");

    let mut frequencies = vec![0f64; alphabet.len()];
    text.iter().for_each(|&character| frequencies[character as usize] += 1.);
    frequencies.iter_mut().for_each(|frequency| *frequency /= text.len() as f64);
    let prior = Tensor::from_vec(frequencies, alphabet.len(), &Device::Cpu)?;
    let smoothing = Smoothing::toward(args.epsilon, &prior).context("--epsilon cannot be used")?;
    let criterion = LabelSmoothingLoss::new(smoothing);

    let params = ParamsAdamW { lr: args.lr, ..ParamsAdamW::default() };
    let mut optimizer = AdamW::new(variables.all_vars(), params)?;
    let bar = ProgressBar::new(args.steps.into())
        .with_style(ProgressStyle::with_template("{bar:40} {pos}/{len} {msg} {eta}")?);
    let (weight, bias) = (model.head.weight(), model.head.bias());
    let start = Instant::now();
    for step in 1..=args.steps {
        let starts: Vec<usize> =
            (0..args.batch_size).map(|_| rng.random_range(0..training.len() - length)).collect();
        let (x, y) = passages(training, &starts, length)?;
        optimizer.set_learning_rate(args.lr * (1. - f64::from(step - 1) / f64::from(args.steps)));
        // No tensor of all logits is allocated.
        let loss = criterion.forward_linear(&model.hidden_states(&x)?, weight, bias, &y)?;
        optimizer.backward_step(&loss)?;
        bar.inc(1);
        if step % args.steps.div_ceil(10) == 0 || step == args.steps {
            let held_out = bits(&model, &criterion, held_out, length)?;
            let loss = f64::from(loss.to_scalar::<f32>()?) / LN_2;
            bar.set_message(format!("{held_out:.2} bits"));
            bar.suspend(|| println!(
                "step {step:5}: loss {loss:.3} bits a character, {held_out:.3} on the held-out text, unsmoothed"
            ));
        }
    }
    bar.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64();
    let tokens = f64::from(args.steps) * f64::from(args.batch_size) * f64::from(args.length);
    println!(
        "{:.0} tokens a second, {:.0} MB of memory at most",
        tokens / seconds,
        ALLOCATOR.peak_usage_as_mb()
    );
    println!("\n{}", generate(&model, &alphabet, text[0], args.sample, &mut rng)?);
    Ok(())
}
