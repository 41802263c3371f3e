//! Times the loss and its kernels on the CPU, beside other implementations and plain reads and copies of the logits.
//!
//! `cargo bench --bench loss` runs all benchmarks. With `-- 4096x1000`, it runs those whose name contains 4096x1000.
//! Throughput counts the bytes of the logits once. `benches/table.py` makes a table of the results.
//!
//! The allocator is mimalloc, which reuses freed memory for some time before it returns it to the system. Long training
//! runs benefit from this. With `MIMALLOC_PURGE_DELAY=-1`, mimalloc never returns memory.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Smoothing, reference, testing};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use mimalloc::MiMalloc;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;
use std::cell::LazyCell;
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Shapes and their class dimensions: a toy problem, a small classifier, ImageNet, two vocabularies, a single token, and
/// a segmentation of images.
const SHAPES: [(&[usize], usize); 7] = [
    (&[32, 3], 1),
    (&[128, 10], 1),
    (&[4096, 1000], 1),
    (&[1024, 32_000], 1),
    (&[256, 128_256], 1),
    (&[1, 128_256], 1),
    (&[8, 21, 256, 256], 1),
];

/// Random logits, and random labels for their rows.
fn inputs(shape: &[usize], class_dim: usize, dtype: DType) -> Result<(Var, Tensor)> {
    let mut rows = shape.to_vec();
    let num_classes = rows.remove(class_dim);
    let mut rng = StdRng::seed_from_u64(0);
    let mut logit = || rng.random_range(-8f32..8.);
    let logits: Vec<f32> = (0..shape.iter().product()).map(|_| logit()).collect();
    let mut label = || rng.random_range(0..num_classes as u32);
    let labels: Vec<u32> = (0..rows.iter().product()).map(|_| label()).collect();
    let logits = Tensor::from_vec(logits, shape, &Device::Cpu)?.to_dtype(dtype)?;
    Ok((Var::from_tensor(&logits)?, Tensor::from_vec(labels, rows, &Device::Cpu)?))
}

/// A buffer of the same size as a tensor. Reading and copying it are lower bounds for the time of a kernel.
struct Bytes(Vec<u64>);

impl Bytes {
    /// The words that a thread processes at a time. A buffer of fewer words stays on one thread.
    const CHUNK: usize = 8192;

    fn new(num_bytes: usize) -> Self {
        Self((0..(num_bytes / size_of::<u64>()) as u64).collect())
    }

    fn read(&self) -> u64 {
        let sum = |words: &[u64]| words.iter().fold(0u64, |sum, word| sum.wrapping_add(*word));
        match self.0.len() {
            ..=Self::CHUNK => sum(&self.0),
            _ => self.0.par_chunks(Self::CHUNK).map(sum).reduce(|| 0, u64::wrapping_add),
        }
    }

    fn copy_to(&self, out: &mut Self) {
        match self.0.len() {
            ..=Self::CHUNK => out.0.copy_from_slice(&self.0),
            _ => self
                .0
                .par_chunks(Self::CHUNK)
                .zip(out.0.par_chunks_mut(Self::CHUNK))
                .for_each(|(words, out)| out.copy_from_slice(words)),
        }
    }
}

/// A benchmark group whose throughput counts the logits.
fn group<'a>(
    criterion: &'a mut Criterion,
    pass: &str,
    name: &str,
    num_bytes: usize,
) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(format!("{name} {pass}"));
    group
        .throughput(Throughput::Bytes(num_bytes as u64))
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    group
}

fn bench_shape(
    criterion: &mut Criterion,
    shape: &[usize],
    class_dim: usize,
    dtype: DType,
) -> candle_label_smoothing::Result<()> {
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_class_dim(class_dim);
    let dims: Vec<String> = shape.iter().map(usize::to_string).collect();
    let name = format!("{} {}", dims.join("x"), dtype.as_str());
    let num_bytes = shape.iter().product::<usize>() * dtype.size_in_bytes();
    // Each input is made when the first benchmark that needs it runs, so that the benchmarks which the command line excludes take
    // no time. Criterion calls the functions below for each sample.
    let inputs = LazyCell::new(|| inputs(shape, class_dim, dtype).expect("valid inputs"));
    let bytes = LazyCell::new(|| Bytes::new(num_bytes));

    let mut forward = group(criterion, "forward", &name, num_bytes);
    forward.bench_function("read the bytes", |b| {
        let bytes = &*bytes;
        b.iter(|| bytes.read())
    });
    forward.bench_function("kernel", |b| {
        let (logits, targets) = &*inputs;
        b.iter(|| testing::forward_rows(&loss, logits, targets).expect("losses"))
    });
    forward.bench_function("fused", |b| {
        let (logits, targets) = &*inputs;
        b.iter(|| loss.forward(logits, targets).expect("a loss"))
    });
    forward.bench_function("fused, with metrics", |b| {
        let (logits, targets) = &*inputs;
        b.iter(|| loss.forward_with_metrics(logits, targets).expect("a loss"))
    });
    forward.bench_function("stock ops", |b| {
        let (logits, targets) = &*inputs;
        b.iter(|| reference::forward(&loss, logits, targets).expect("a loss"))
    });
    if shape.len() == 2 {
        // candle-nn has no smoothing.
        forward.bench_function("candle-nn", |b| {
            let (logits, targets) = &*inputs;
            b.iter(|| candle_nn::loss::cross_entropy(logits, targets).expect("a loss"))
        });
    }
    forward.finish();

    let mut backward = group(criterion, "backward", &name, num_bytes);
    let mut copy = None;
    backward.bench_function("copy the bytes", |b| {
        let copy = copy.get_or_insert_with(|| Bytes(bytes.0.clone()));
        b.iter(|| bytes.copy_to(copy))
    });
    drop(copy);
    let saved = LazyCell::new(|| {
        let (losses, saved) = testing::forward_rows(&loss, &inputs.0, &inputs.1).expect("losses");
        (saved.expect("a saved state"), losses.ones_like().expect("a tensor"))
    });
    backward.bench_function("kernel", |b| {
        let (logits, (saved, grad_output)) = (&inputs.0, &*saved);
        b.iter(|| testing::backward_rows(saved, logits, grad_output).expect("a gradient"))
    });
    backward.finish();

    let mut both = group(criterion, "forward and backward", &name, num_bytes);
    // candle's backward adds each gradient to zeros. No op can avoid this cost.
    let gradient = LazyCell::new(|| inputs.0.ones_like().expect("a tensor"));
    both.bench_function("candle's zeros and addition", |b| {
        let (logits, gradient) = (inputs.0.as_detached_tensor(), &*gradient);
        b.iter(|| logits.zeros_like().and_then(|zeros| zeros.add(gradient)).expect("a tensor"))
    });
    both.bench_function("fused", |b| {
        let (logits, targets) = &*inputs;
        b.iter(|| backward_of(loss.forward(logits, targets).expect("a loss")))
    });
    both.bench_function("stock ops", |b| {
        let (logits, targets) = &*inputs;
        b.iter(|| backward_of(reference::forward(&loss, logits, targets).expect("a loss")))
    });
    if shape.len() == 2 {
        both.bench_function("candle-nn", |b| {
            let (logits, targets) = &*inputs;
            b.iter(|| backward_of(candle_nn::loss::cross_entropy(logits, targets).expect("a loss")))
        });
    }
    both.finish();
    Ok(())
}

fn backward_of(loss: Tensor) -> GradStore {
    loss.backward().expect("gradients")
}

fn bench(criterion: &mut Criterion) {
    for (shape, class_dim) in SHAPES {
        for dtype in [DType::F32, DType::BF16] {
            bench_shape(criterion, shape, class_dim, dtype).expect("valid inputs");
        }
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
