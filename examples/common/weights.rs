//! Initial weights from a seed.

use anyhow::{Context, Result};
use candle_core::Tensor;
use candle_nn::VarMap;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Draws the initial weights from `rng`, since candle cannot seed its generator on the CPU. Visits the variables by name,
/// since the order of `VarMap` differs between runs.
pub fn seed_weights(variables: &VarMap, rng: &mut ChaCha8Rng) -> Result<()> {
    let data = variables.data().lock().ok().context("the variables are in use")?;
    let mut named: Vec<_> = data.iter().collect();
    named.sort_by_key(|(name, _)| *name);
    for (_, variable) in named {
        // An output of a linear layer or of a convolution sums over all dimensions but the first.
        let num_inputs = match variable.dims() {
            [_, inputs @ ..] if !inputs.is_empty() => inputs.iter().product(),
            dims => dims.iter().product::<usize>(),
        };
        let bound = 1. / (num_inputs as f32).sqrt();
        let weights: Vec<f32> =
            (0..variable.elem_count()).map(|_| rng.random_range(-bound..=bound)).collect();
        variable.set(&Tensor::from_vec(weights, variable.shape(), variable.device())?)?;
    }
    Ok(())
}
