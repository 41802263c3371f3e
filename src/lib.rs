//! Label-smoothing cross-entropy for [candle](https://docs.rs/candle-core), fused into one read of
//! the logits.
//!
//! A classifier trained on hard 0/1 targets is pushed towards infinite confidence. Label smoothing
//! trains it on slightly soft targets instead, `[0.05, 0.9, 0.05]` in place of `[0, 1, 0]`:
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_label_smoothing::{LabelSmoothingLoss, Smoothing};
//! use candle_nn::{Module, Optimizer, VarBuilder, VarMap, linear};
//!
//! let variables = VarMap::new();
//! let model = linear(4, 3, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
//! let mut optimizer = candle_nn::AdamW::new_lr(variables.all_vars(), 1e-2)?;
//! let loss = LabelSmoothingLoss::new(Smoothing::over_others(0.1)?);
//!
//! let rows = Tensor::new(&[[5.1f32, 3.5, 1.4, 0.2], [6.3, 3.3, 6.0, 2.5]], &Device::Cpu)?;
//! let labels = Tensor::new(&[0u32, 2], &Device::Cpu)?;
//! for _ in 0..10 {
//!     optimizer.backward_step(&loss.forward(&model.forward(&rows)?, &labels)?)?;
//! }
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! # The formula
//!
//! For a row of logits x over K classes and its target distribution p (the one-hot vector of a class
//! label, or given probabilities), with q the smoothed target, w the class weights and z the z-loss
//! coefficient:
//!
//! ```text
//! q_k  = (1−ε)·p_k + ε/K                   Smoothing::over_all(ε)
//!      = (1−ε)·p_k + ε·(1−p_k)/(K−1)       Smoothing::over_others(ε)
//!      = (1−ε)·p_k + ε·prior_k             Smoothing::toward(ε, prior)
//!
//! lse  = log Σ_k exp(x_k)
//! loss = Σ_k w_k·q_k·(lse − x_k) + z·lse²
//! ∂loss/∂x_k = softmax(x)_k·(Σ_j w_j·q_j + 2·z·lse) − w_k·q_k
//! ```
//!
//! Everything is computed relative to the row's maximum, in f32 for f16, bf16 and f32 logits and in
//! f64 for f64 logits, in one pass over the logits for the loss and one more for the gradient.
//!
//! # What there is
//!
//! - [`LabelSmoothingLoss`]: the loss, with class weights, an ignored index, any class dimension,
//!   z-loss and three reductions.
//! - [`LabelSmoothingLoss::forward_linear`]: the same loss of hidden states and a classifier's weight, for logits
//!   that are too large to hold.
//! - [`Smoothing`]: the conventions, which the field mixes up under one name.
//! - [`smooth_targets`]: the soft targets themselves.
//! - [`check_targets`]: whether class targets are in range, for devices that cannot say so.
//! - [`guide`]: which ε and which convention, coming from PyTorch, padding, mixup, class weights, batches in
//!   pieces, half types, large vocabularies.
//!
//! # Devices
//!
//! The CPU; with the feature `cuda` NVIDIA's GPUs; with the feature `metal` Apple's, which have no f64
//! ([`Error::MetalF64`]). Logits and targets are on one device, which is where the loss and the gradient
//! are made; class weights and priors may be on any.
//!
//! On a GPU nothing waits for the device, and a class target that is out of range makes its row's loss and
//! gradient NaN where the CPU gives an error: [`check_targets`] finds it. The CPU adds up the rows' losses in
//! f64, a GPU in the dtype of the arithmetic, with what rounding loses kept beside the sum. Results have
//! the same bits in every run, on the CPU for every number of threads; two devices differ by some
//! roundings.
//!
//! Errors convert into candle's and back ([`Error`]), so `?` works in a candle model.

#![warn(missing_docs, missing_debug_implementations)]

mod backend;
mod error;
// Nothing but documentation.
#[cfg(any(doc, doctest))]
pub mod guide;
mod loss;
mod op;
#[doc(hidden)]
pub mod reference;
mod smoothing;
#[doc(hidden)]
pub mod testing;

// After `loss`, so that the documentation of its type begins with `new`.
mod linear;

pub use error::{Error, Result};
pub use loss::{LabelSmoothingLoss, Reduction, check_targets};
pub use smoothing::{Smoothing, smooth_targets};

/// The README's program, compiled and run with the documentation's examples.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
