//! A causal transformer learns to sort letters: after the prompt `dbca>` it writes `abcd.`.
//!
//! It shows padding (`with_ignore_index`), a prompt without loss (`weigh_rows`), targets shifted by `narrow`, and the
//! perplexity and the token accuracy over several batches. `cargo run --release --example causal_lm` runs it.
//!
//! It takes about 1 second on two cores. After 80 steps, all tokens of the answers to new prompts are right. Their perplexity falls to
//! 1.11, and not to 1: smoothing sets the probability of the right token to 0.9 + 0.1/12 = 0.908, and 1/0.908 is 1.10.

#[path = "common/weights.rs"]
mod weights;

use anyhow::Result;
use candle_core::{D, DType, Device, IndexOp, Tensor};
use candle_label_smoothing::{LabelSmoothingLoss, Metrics, Smoothing};
use candle_nn::{AdamW, Embedding, Linear, Module, Optimizer, VarBuilder, VarMap};
use candle_nn::{embedding, linear, ops::softmax};
use clap::{Parser, value_parser};
use rand::{Rng, SeedableRng, seq::index::sample};
use rand_chacha::ChaCha8Rng;
use weights::seed_weights;

const TOKENS: &[u8] = b"abcdefghij>.";
/// `>` ends a prompt, `.` ends an answer.
const MARK: u32 = 10;
const END: u32 = 11;
/// Eight letters, the mark, eight letters, the end.
const MAX_LENGTH: usize = 18;
/// The target of padding.
const IGNORED: i64 = -100;
const SIZE: usize = 32;

/// Trains a causal transformer to sort the letters of a prompt.
#[derive(Parser)]
#[command(allow_negative_numbers = true)]
struct Args {
    /// Steps of the optimizer
    #[arg(long, default_value_t = 200, value_parser = value_parser!(u32).range(1..))]
    steps: u32,
}

/// One block: masked self-attention and a perceptron.
struct Model {
    tokens: Embedding,
    positions: Embedding,
    qkv: Linear,
    mlp: [Linear; 2],
    head: Linear,
}

impl Model {
    fn new(vb: VarBuilder) -> candle_core::Result<Self> {
        Ok(Self {
            tokens: embedding(TOKENS.len(), SIZE, vb.pp("tokens"))?,
            positions: embedding(MAX_LENGTH, SIZE, vb.pp("positions"))?,
            qkv: linear(SIZE, 3 * SIZE, vb.pp("qkv"))?,
            mlp: [linear(SIZE, 4 * SIZE, vb.pp("in"))?, linear(4 * SIZE, SIZE, vb.pp("out"))?],
            head: linear(SIZE, TOKENS.len(), vb.pp("head"))?,
        })
    }

    /// Tokens, (batch, length), to the logits of the next token, (batch, length, tokens).
    fn forward(&self, tokens: &Tensor) -> candle_core::Result<Tensor> {
        let length = tokens.dim(1)?;
        let positions = Tensor::arange(0, length as u32, tokens.device())?;
        let x = self.tokens.forward(tokens)?;
        let x = x.broadcast_add(&self.positions.forward(&positions)?)?;
        let qkv = self.qkv.forward(&x)?.chunk(3, D::Minus1)?;
        let scores = (qkv[0].matmul(&qkv[1].t()?)? / (SIZE as f64).sqrt())?;
        // Later positions are masked, so padding at the end of a sequence changes nothing before it.
        let mask = ((Tensor::tril2(length, DType::F32, tokens.device())? - 1.)? * 1e9)?;
        // candle-nn's `softmax_last_dim` has no gradient.
        let attention = softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
        let x = (x + attention.matmul(&qkv[2])?)?;
        let hidden = self.mlp[1].forward(&self.mlp[0].forward(&x)?.relu()?)?;
        self.head.forward(&(x + hidden)?)
    }
}

/// A prompt of different letters, and its answer.
fn exercise(rng: &mut ChaCha8Rng) -> [Vec<u32>; 2] {
    let length = rng.random_range(2..=8);
    let mut letters: Vec<u32> =
        sample(rng, MARK as usize, length).iter().map(|i| i as u32).collect();
    let prompt = [&letters[..], &[MARK]].concat();
    letters.sort_unstable();
    [prompt, [letters, vec![END]].concat()]
}

/// Tokens (u32), targets (i64) and a mask of 1 after the prompt (u8), each of shape (16, `MAX_LENGTH`).
type Batch = [Tensor; 3];

fn random_batch(rng: &mut ChaCha8Rng) -> Result<Batch> {
    let (mut tokens, mut targets, mut mask) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..16 {
        let [prompt, answer] = exercise(rng);
        let sequence = [&prompt[..], &answer].concat();
        for i in 0..MAX_LENGTH {
            // Any token can be the padding of the input, because the loss ignores what follows it.
            tokens.push(sequence.get(i).copied().unwrap_or(END));
            targets.push(sequence.get(i).map_or(IGNORED, |&token| token.into()));
            mask.push(u8::from(i >= prompt.len()));
        }
    }
    let (shape, cpu) = ((16, MAX_LENGTH), &Device::Cpu);
    let tokens = Tensor::from_vec(tokens, shape, cpu)?;
    Ok([tokens, Tensor::from_vec(targets, shape, cpu)?, Tensor::from_vec(mask, shape, cpu)?])
}

/// The loss of the answers. With thousands of tokens, let the model return the hidden states, and take
/// `forward_linear_with_metrics` with the weight and the bias of the head: this saves the memory of the logits.
fn loss_of(model: &Model, loss: &LabelSmoothingLoss, batch: &Batch) -> Result<(Tensor, Metrics)> {
    let [tokens, targets, mask] = batch;
    let length = MAX_LENGTH - 1;
    let logits = model.forward(&tokens.narrow(1, 0, length)?)?;
    // Each position predicts the next token.
    let (targets, mask) = (targets.narrow(1, 1, length)?, mask.narrow(1, 1, length)?);
    Ok(loss.weigh_rows(&mask)?.forward_with_metrics(&logits, &targets)?)
}

/// Perplexity and token accuracy. The batches have different numbers of tokens that count, so sums are added, not means.
fn evaluate(model: &Model, loss: &LabelSmoothingLoss, batches: &[Batch]) -> Result<[f64; 2]> {
    let mut totals = Tensor::zeros(3, DType::F64, &Device::Cpu)?;
    for batch in batches {
        let (_, metrics) = loss_of(model, loss, batch)?;
        let rows = Tensor::stack(&[metrics.nll, metrics.correct, metrics.counted], 0)?;
        totals = (totals + rows.to_dtype(DType::F64)?.sum((1, 2))?)?;
    }
    let totals = totals.to_vec1::<f64>()?;
    Ok([(totals[0] / totals[2]).exp(), totals[1] / totals[2]])
}

/// Writes the most likely token until the answer ends.
fn complete(model: &Model, prompt: &[u32]) -> Result<Vec<u32>> {
    let mut tokens = prompt.to_vec();
    while tokens.len() < MAX_LENGTH && tokens.last() != Some(&END) {
        let logits = model.forward(&Tensor::new(&tokens[..], &Device::Cpu)?.unsqueeze(0)?)?;
        tokens.push(logits.i((0, tokens.len() - 1))?.argmax(0)?.to_scalar()?);
    }
    Ok(tokens)
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let variables = VarMap::new();
    let model = Model::new(VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
    seed_weights(&variables, &mut rng)?;
    let mut optimizer = AdamW::new_lr(variables.all_vars(), 1e-2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_ignore_index(IGNORED);
    let held_out = (0..4).map(|_| random_batch(&mut rng)).collect::<Result<Vec<_>>>()?;
    for step in 1..=args.steps {
        let (step_loss, _) = loss_of(&model, &loss, &random_batch(&mut rng)?)?;
        optimizer.backward_step(&step_loss)?;
        if step % args.steps.div_ceil(5) == 0 || step == args.steps {
            let [perplexity, accuracy] = evaluate(&model, &loss, &held_out)?;
            println!("step {step:4}: loss {:.3}", step_loss.to_scalar::<f32>()?);
            println!("  new prompts: perplexity {perplexity:.3}, token accuracy {accuracy:.3}");
        }
    }
    for _ in 0..5 {
        let [prompt, answer] = exercise(&mut rng);
        let written = complete(&model, &prompt)?;
        let text: String = written.iter().map(|&token| TOKENS[token as usize] as char).collect();
        println!("{text} {}", if written[prompt.len()..] == answer { "right" } else { "wrong" });
    }
    Ok(())
}
