//! Short guides to using the loss.
//!
//! - Getting started: [`epsilon`], [`migration`], [`cookbook`].
//! - Targets and classes: [`padding`], [`masks`], [`segmentation`], [`soft_targets`], [`class_weights`].
//! - Training: [`metrics`], [`accumulation`], [`mixed_precision`], [`language_models`], [`large_vocabularies`],
//!   [`several_devices`].
//! - The design of the crate: [`architecture`].

#[doc = include_str!("guide/epsilon.md")]
pub mod epsilon {}

#[doc = include_str!("guide/migration.md")]
pub mod migration {}

#[doc = include_str!("guide/cookbook.md")]
pub mod cookbook {}

#[doc = include_str!("guide/padding.md")]
pub mod padding {}

#[doc = include_str!("guide/masks.md")]
pub mod masks {}

#[doc = include_str!("guide/metrics.md")]
pub mod metrics {}

#[doc = include_str!("guide/language_models.md")]
pub mod language_models {}

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

#[doc = include_str!("guide/several_devices.md")]
pub mod several_devices {}

#[doc = include_str!("guide/architecture.md")]
pub mod architecture {}
