//! The fused loss beside the same loss by stock candle ops and candle-nn's cross-entropy, on the CPU.
//!
//! `cargo bench` runs everything; `cargo bench -- 4096x1000` what has that in its name. Throughput
//! counts the bytes of the logits once.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Smoothing, reference};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// A way to a loss from logits and targets.
type Loss<'a> = &'a dyn Fn(&Tensor, &Tensor) -> Result<Tensor>;

/// Logits of the shape and labels for its rows.
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

/// The shapes, and where the classes are: a toy, a small classifier, ImageNet, two vocabularies, a
/// token at a time, and a batch of images to segment.
const SHAPES: [(&[usize], usize); 7] = [
    (&[32, 3], 1),
    (&[128, 10], 1),
    (&[4096, 1000], 1),
    (&[1024, 32_000], 1),
    (&[256, 128_256], 1),
    (&[1, 128_256], 1),
    (&[8, 21, 256, 256], 1),
];

fn bench(criterion: &mut Criterion) {
    let fused = LabelSmoothingLoss::new(Smoothing::over_all(0.1).expect("a valid epsilon"));
    for (shape, class_dim) in SHAPES {
        let fused = fused.clone().with_class_dim(class_dim);
        let ours = |logits: &Tensor, targets: &Tensor| Ok(fused.forward(logits, targets)?);
        let stock =
            |logits: &Tensor, targets: &Tensor| Ok(reference::forward(&fused, logits, targets)?);
        let mut ways: Vec<(&str, Loss)> = vec![("fused", &ours), ("stock ops", &stock)];
        if shape.len() == 2 {
            // Without smoothing, which it does not have.
            ways.push(("candle-nn", &candle_nn::loss::cross_entropy));
        }
        for dtype in [DType::F32, DType::BF16] {
            let (logits, targets) = inputs(shape, class_dim, dtype).expect("inputs");
            let bytes = (logits.elem_count() * dtype.size_in_bytes()) as u64;
            let dims: Vec<String> = shape.iter().map(usize::to_string).collect();
            let name = format!("{} {}", dims.join("x"), dtype.as_str());

            let mut group = criterion.benchmark_group("forward");
            group.sample_size(10).throughput(Throughput::Bytes(bytes));
            for (way, loss) in &ways {
                group.bench_function(BenchmarkId::new(*way, &name), |b| {
                    b.iter(|| loss(&logits, &targets).expect("a loss"))
                });
            }
            group.finish();

            let mut group = criterion.benchmark_group("forward and backward");
            group.sample_size(10).throughput(Throughput::Bytes(bytes));
            for (way, loss) in &ways {
                group.bench_function(BenchmarkId::new(*way, &name), |b| {
                    b.iter(|| {
                        let loss = loss(&logits, &targets).expect("a loss");
                        loss.backward().expect("gradients")
                    })
                });
            }
            group.finish();
        }
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
