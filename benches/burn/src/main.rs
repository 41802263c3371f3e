//! Times Burn's cross-entropy with label smoothing on the shapes and with the allocator of `benches/loss.rs`.
//!
//! `cargo run --release > burn.md` writes a table of medians in milliseconds. Burn's ndarray backend has no bf16, so the
//! dtype is f32. Burn's loss takes logits of shape (N, K) only, so the images are left out.

use burn::backend::ndarray::NdArrayDevice;
use burn::backend::{Autodiff, NdArray};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::tensor::{Distribution, Int, Tensor, TensorData, backend::Backend};
use mimalloc::MiMalloc;
use std::hint::black_box;
use std::time::{Duration, Instant};

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

const SHAPES: [[usize; 2]; 6] =
    [[32, 3], [128, 10], [4096, 1000], [1024, 32_000], [256, 128_256], [1, 128_256]];

fn median<T>(mut run: impl FnMut() -> T) -> f64 {
    black_box(run());
    let mut times = Vec::new();
    let begin = Instant::now();
    while times.len() < 7 || begin.elapsed() < Duration::from_secs(2) {
        let start = Instant::now();
        black_box(run());
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn targets<B: Backend<Device = NdArrayDevice>>(
    shape: [usize; 2],
    device: &NdArrayDevice,
) -> Tensor<B, 1, Int> {
    let [rows, classes] = shape;
    let targets: Vec<i64> = (0..rows).map(|row| (row * 7919 % classes) as i64).collect();
    Tensor::from_data(TensorData::new(targets, [rows]), device)
}

fn main() {
    let device = NdArrayDevice::default();
    println!("# Burn 0.21\n\n| | forward | forward and backward |\n| --- | ---: | ---: |");
    for shape in SHAPES {
        let uniform = Distribution::Uniform(-8., 8.);
        let config = || CrossEntropyLossConfig::new().with_smoothing(Some(0.1));

        let loss = config().init::<NdArray>(&device);
        let logits = Tensor::<NdArray, 2>::random(shape, uniform, &device);
        let labels = targets::<NdArray>(shape, &device);
        let forward = median(|| loss.forward(logits.clone(), labels.clone()).into_data());

        let loss = config().init::<Autodiff<NdArray>>(&device);
        let labels = targets::<Autodiff<NdArray>>(shape, &device);
        let both = median(|| {
            let logits = Tensor::<Autodiff<NdArray>, 2>::from_inner(logits.clone()).require_grad();
            let gradients = loss.forward(logits.clone(), labels.clone()).backward();
            logits.grad(&gradients).map(|gradient| gradient.shape())
        });
        println!("| {}x{} f32 | {forward:.4} | {both:.4} |", shape[0], shape[1]);
    }
}
