//! The crate's tests on a real GPU: `cargo test --features cuda --test gpu`, or with `metal`.
//!
//! Without a GPU the tests are skipped with a message. With `REQUIRE_GPU=1` they fail.
#![allow(clippy::duplicate_mod, reason = "each file of tests brings the common part along")]

#[path = "../block_edges.rs"]
mod block_edges;
#[path = "../gradients.rs"]
mod gradients;
#[path = "../emulator/kernels.rs"]
mod kernels;
#[path = "../layouts.rs"]
mod layouts;
#[path = "../linear.rs"]
mod linear;
#[path = "../metrics.rs"]
mod metrics;
#[path = "../numerics.rs"]
mod numerics;
#[path = "../options.rs"]
mod options;
#[path = "../parity.rs"]
mod parity;
#[path = "../shards.rs"]
mod shards;
#[path = "../size_limits.rs"]
mod size_limits;

#[cfg(feature = "cuda")]
mod cuda;
