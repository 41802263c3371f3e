//! Guides to the loss in use, each read in two minutes. Their code is run with the tests.
//!
//! | | |
//! | --- | --- |
//! | [`epsilon`] | which ε, which convention, and what to expect of either |
//! | [`migration`] | coming from candle-nn's `cross_entropy` or PyTorch's `CrossEntropyLoss` |
//! | [`padding`] | sequences of unequal length, and `ignore_index` |
//! | [`soft_targets`] | mixup and distillation: probabilities as targets |
//! | [`class_weights`] | rare classes, and what a mean divides by |
//! | [`accumulation`] | one batch in several pieces, on one device or on many |
//! | [`segmentation`] | images, with the classes in dimension 1 |
//! | [`mixed_precision`] | logits in f16 and bf16 |
//! | [`large_vocabularies`] | `forward_linear`, and when `forward` is better |
//! | [`architecture`] | how the crate is built |

#[doc = include_str!("guide/epsilon.md")]
pub mod epsilon {}

#[doc = include_str!("guide/migration.md")]
pub mod migration {}

#[doc = include_str!("guide/padding.md")]
pub mod padding {}

#[doc = include_str!("guide/soft_targets.md")]
pub mod soft_targets {}

#[doc = include_str!("guide/class_weights.md")]
pub mod class_weights {}

#[doc = include_str!("guide/accumulation.md")]
pub mod accumulation {}

#[doc = include_str!("guide/segmentation.md")]
pub mod segmentation {}

#[doc = include_str!("guide/mixed_precision.md")]
pub mod mixed_precision {}

#[doc = include_str!("guide/large_vocabularies.md")]
pub mod large_vocabularies {}

#[doc = include_str!("guide/architecture.md")]
pub mod architecture {}
