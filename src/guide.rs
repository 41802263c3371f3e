//! Guides to the loss in use, each read in two minutes.
//!
//! - To begin with: [`epsilon`], [`migration`].
//! - What the targets are: [`padding`], [`segmentation`], [`soft_targets`], [`class_weights`].
//! - How the training goes: [`accumulation`], [`mixed_precision`], [`large_vocabularies`].
//! - How the crate is built: [`architecture`].

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
