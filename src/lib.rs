//! Label-smoothing cross-entropy for [candle](https://docs.rs/candle-core), fused into one read of the logits.
//!
//! Hard 0/1 targets push a classifier towards infinite confidence. Label smoothing replaces them by slightly soft
//! targets, `[0, 1, 0]` by `[0.05, 0.9, 0.05]`:
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_label_smoothing::{LabelSmoothingLoss, Smoothing};
//! use candle_nn::{Module, Optimizer, VarBuilder, VarMap, linear};
//!
//! let variables = VarMap::new();
//! let model = linear(4, 3, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
//! let mut optimizer = candle_nn::AdamW::new_lr(variables.all_vars(), 1e-2)?;
//! let criterion = LabelSmoothingLoss::new(Smoothing::over_others(0.1)?); // PyTorch's convention: over_all
//!
//! let rows = Tensor::new(&[[5.1f32, 3.5, 1.4, 0.2], [6.3, 3.3, 6.0, 2.5]], &Device::Cpu)?;
//! let labels = Tensor::new(&[0u32, 2], &Device::Cpu)?;
//! for _ in 0..10 {
//!     let loss = criterion.forward(&model.forward(&rows)?, &labels)?;
//!     optimizer.backward_step(&loss)?;
//! }
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! # The formula
//!
//! For a row of logits x over K classes and its target distribution p (the one-hot vector of a class
//! label, or given probabilities), with q the smoothed target, w the class weights, z the z-loss
//! coefficient and v the weight of the row:
//!
//! ```text
//! q_k  = (1−ε)·p_k + ε/K                   Smoothing::over_all(ε)
//!      = (1−ε)·p_k + ε·(1−p_k)/(K−1)       Smoothing::over_others(ε)
//!      = (1−ε)·p_k + ε·prior_k             Smoothing::toward(ε, prior)
//!      = (1−ε)·p_k + ε/n                   Smoothing::over_unmasked(ε), for the n classes with x_k > −∞
//!      = (1−ε)·p_k                             and for the others
//!
//! lse  = log Σ_k exp(x_k)
//! loss = v·(Σ_k w_k·q_k·(lse − x_k) + z·lse²)
//! ∂loss/∂x_k = v·(softmax(x)_k·(Σ_j w_j·q_j + 2·z·lse) − w_k·q_k)
//! ```
//!
//! Options that are not set have w = 1, z = 0 and v = 1. With a logit scale s and a softcap c, the formulas use
//! x = c·tanh(s·a/c) for the given logit a. Without a softcap they use x = s·a. A logit of −∞ stays −∞. The gradient of a then
//! has the factor s·(1 − tanh²(s·a/c)), or s.
//!
//! Every logit is taken relative to the largest logit of its row. The arithmetic runs in f32 for f16, bf16 and f32 logits and in
//! f64 for f64 logits. The loss takes one pass over the logits, and the gradient one more.
//!
//! # Overview
//!
//! - [`LabelSmoothingLoss`]: the loss, with class weights, row weights, an ignored index, any class dimension, z-loss, a logit
//!   scale, a softcap and four [reductions](Reduction).
//! - [`LabelSmoothingLoss::forward_with_metrics`]: the loss, and the [`Metrics`] of the rows from the same read of the logits:
//!   negative log-likelihood, prediction, confidence, entropy.
//! - [`LabelSmoothingLoss::forward_linear`]: the same loss from hidden states and a classifier's weight, with less
//!   memory and in no more time.
//! - [`LabelSmoothingLoss::forward_shard`] and [`forward_linear_shard`](LabelSmoothingLoss::forward_linear_shard): the same loss over a
//!   vocabulary that is split between several processes. [`check_shards`] checks that they agree.
//! - [`Smoothing`]: the conventions of label smoothing. Libraries use this one name for several formulas.
//! - [`smooth_targets`]: the smoothed targets as a tensor.
//! - [`check_targets`]: checks that class targets are in range. On a GPU, `forward` does not check them.
//! - [`guide`]: which ε and which convention, coming from PyTorch, padding, masks, mixup, class weights, metrics, batches in
//!   pieces, half types, language models, large vocabularies, several devices.
//!
//! # Devices
//!
//! The crate supports the CPU, NVIDIA's GPUs of compute capability 7.5 or newer with the feature `cuda`, and Apple's GPUs with the
//! feature `metal`. Apple's GPUs have no f64 ([`Error::MetalF64`]). Logits, targets and row weights must be on one device, where the
//! loss and the gradient are computed. Class weights and priors may be on any device. The features `accelerate` and `mkl` only enable
//! candle's features of the same names.
//!
//! The kernels for CUDA and Metal pass the crate's tests on an emulator. No GPU has run them yet. In a clone of the repository,
//! `cargo test --features cuda --test gpu` compares them with the CPU, and `cargo test --features metal --test gpu` does so on a Mac.
//!
//! On a GPU the loss and the gradient are computed without waiting for the device. Only the first call with class weights or a
//! prior waits, until they are copied. A class target that is out of range is an error on the CPU. On a GPU such a target makes
//! its row's loss and gradient NaN, and [`check_targets`] finds it. A row weight that is negative or not finite is an error on
//! the CPU too. On a GPU it makes its row NaN, and no function finds it. The CPU sums the rows' losses in f64, a GPU by
//! compensated summation in the dtype of the arithmetic. Results have the same bits in every run, on the CPU for every number of
//! threads. Results of two devices differ by some roundings.
//!
//! A GPU takes at most 2³⁰ rows and 2³⁰ classes. Its kernels are compiled when a combination of dtypes is first used. NVRTC, which
//! candle's CUDA backend needs anyway, takes about half a second, and the driver's own translation comes on top. NVRTC may
//! be older than the GPU, but not newer than the driver.
//!
//! On `wasm32-unknown-unknown` the loss runs on one thread. It uses SIMD if the program is built with
//! `RUSTFLAGS=-Ctarget-feature=+simd128`. candle needs a source of random numbers there, so a program for browsers or Node adds
//! `getrandom = { version = "0.3.4", features = ["wasm_js"] }` to its own `Cargo.toml`.
//!
//! Errors convert into candle's and back ([`Error`]), so `?` works in a candle model.

#![warn(missing_docs, missing_debug_implementations)]

mod autograd;
// The emulator computes with the GPU's kernels.
#[cfg_attr(emulator, allow(dead_code, reason = "only labels are checked on the CPU there"))]
mod cpu;
mod error;
mod exchange;
mod formula;
#[cfg(any(feature = "cuda", feature = "metal", emulator))]
mod gpu;
// It is outside `gpu`, so that its tests run in builds without a GPU.
#[cfg(any(feature = "cuda", feature = "metal", test))]
#[path = "gpu/compile.rs"]
mod gpu_compile;
// Documentation only.
#[cfg(any(doc, doctest))]
pub mod guide;
mod layout;
mod loss;
mod metrics;
#[doc(hidden)]
pub mod reference;
mod smoothing;
#[doc(hidden)]
pub mod testing;

// `linear` and `shard` come after `loss`, so that the documentation of its type begins with `new`.
mod linear;
mod shard;

pub use error::{Error, Result, TargetsOf};
pub use exchange::{Shard, check_shards};
pub use loss::{LabelSmoothingLoss, Reduction, check_targets};
pub use metrics::Metrics;
pub use smoothing::{Smoothing, smooth_targets};

/// The README's program, compiled and run with the documentation's examples.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
