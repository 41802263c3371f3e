//! The model and its batches. Every process draws the same ones from the seed.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::rnn::{GRU, GRUConfig, RNN, gru};
use candle_nn::{Embedding, Module, VarBuilder, VarMap, embedding, linear};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use std::ops::Range;

/// The target of padding, which the loss ignores.
pub const IGNORED: i64 = -100;

/// The body, which is an embedding and a recurrent network, and the head's rows of some classes.
#[derive(Clone)]
pub struct Model {
    embedding: Embedding,
    gru: GRU,
    pub body: Vec<Var>,
    pub weight: Var,
    pub bias: Var,
}

impl Model {
    /// The model of all classes. Its weights depend only on the arguments.
    pub fn new(num_classes: usize, hidden_size: usize, mut rng: ChaCha8Rng) -> Result<Self> {
        let variables = VarMap::new();
        let vb = VarBuilder::from_varmap(&variables, DType::F64, &Device::Cpu);
        let embedding = embedding(num_classes, hidden_size / 4 + 1, vb.pp("embedding"))?;
        let gru = gru(hidden_size / 4 + 1, hidden_size, GRUConfig::default(), vb.pp("gru"))?;
        linear(hidden_size, num_classes, vb.pp("head"))?;

        // By name, since the order of `VarMap` differs between processes.
        let variables = variables.data().lock().ok().context("the variables are in use")?.clone();
        let mut named: Vec<_> = variables.into_iter().collect();
        named.sort_by(|(a, _), (b, _)| a.cmp(b));
        for (_, variable) in &named {
            let bound = 1. / (variable.dims().last().copied().unwrap_or(1) as f64).sqrt();
            let weights: Vec<f64> =
                (0..variable.elem_count()).map(|_| rng.random_range(-bound..=bound)).collect();
            variable.set(&Tensor::from_vec(weights, variable.shape(), variable.device())?)?;
        }
        let (head, body): (Vec<_>, _) =
            named.into_iter().partition(|(name, _)| name.starts_with("head"));
        let body = body.into_iter().map(|(_, variable)| variable).collect();
        let [(_, bias), (_, weight)] = head.try_into().ok().context("expected bias and weight")?;
        Ok(Self { embedding, gru, body, weight, bias })
    }

    /// The model with the head's rows of these classes only. It shares the body.
    pub fn shard(&self, classes: &Range<usize>) -> candle_core::Result<Self> {
        let rows = |head: &Var| Var::from_tensor(&head.narrow(0, classes.start, classes.len())?);
        Ok(Self { weight: rows(&self.weight)?, bias: rows(&self.bias)?, ..self.clone() })
    }

    pub fn variables(&self) -> Vec<Var> {
        [self.body.as_slice(), &[self.weight.clone(), self.bias.clone()]].concat()
    }

    /// All weights in one row.
    pub fn weights(&self) -> candle_core::Result<Tensor> {
        let weights: candle_core::Result<Vec<_>> =
            self.variables().iter().map(|variable| variable.flatten_all()).collect();
        Tensor::cat(&weights?, 0)
    }

    /// The hidden state after each character: (batch, length) to (batch, length, hidden).
    pub fn hidden_states(&self, characters: &Tensor) -> candle_core::Result<Tensor> {
        let states = self.gru.seq(&self.embedding.forward(characters)?)?;
        Tensor::stack(&states.iter().map(|state| state.h()).collect::<Vec<_>>(), 1)
    }
}

/// Passages of a text, and as their targets the characters that follow. Both have the shape (passages, length).
pub struct Batch {
    pub characters: Tensor,
    pub targets: Tensor,
}

impl Batch {
    /// Draws passages. Each is cut at some place after its first half, and the rest is padding.
    pub fn draw(
        text: &[u32],
        num_passages: usize,
        length: usize,
        rng: &mut ChaCha8Rng,
    ) -> Result<Self> {
        let (mut characters, mut targets) = (Vec::<u32>::new(), Vec::<i64>::new());
        for _ in 0..num_passages {
            let start = rng.random_range(0..text.len() - length);
            let end = rng.random_range(length.div_ceil(2)..=length);
            characters.extend(&text[start..][..length]);
            targets.extend(text[start + 1..][..end].iter().map(|&target| i64::from(target)));
            targets.extend((end..length).map(|_| IGNORED));
        }
        let shape = (num_passages, length);
        Ok(Self {
            characters: Tensor::from_vec(characters, shape, &Device::Cpu)?,
            targets: Tensor::from_vec(targets, shape, &Device::Cpu)?,
        })
    }

    /// The part of the batch with these passages.
    pub fn passages(&self, passages: Range<usize>) -> candle_core::Result<Self> {
        let part = |tensor: &Tensor| tensor.narrow(0, passages.start, passages.len());
        Ok(Self { characters: part(&self.characters)?, targets: part(&self.targets)? })
    }
}

/// The classes of a text's characters, and the frequency of each class.
pub fn classes_of(text: &str) -> (Vec<u32>, Vec<f64>) {
    let mut alphabet: Vec<char> = text.chars().collect();
    let part = 1. / alphabet.len() as f64;
    alphabet.sort_unstable();
    alphabet.dedup();
    let class = |character| alphabet.partition_point(|known| *known < character);
    let classes: Vec<u32> = text.chars().map(|character| class(character) as u32).collect();
    let mut frequencies = vec![0.; alphabet.len()];
    classes.iter().for_each(|&class| frequencies[class as usize] += part);
    (classes, frequencies)
}
