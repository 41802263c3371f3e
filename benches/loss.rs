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

fn inputs(rows: usize, num_classes: usize, dtype: DType) -> Result<(Var, Tensor)> {
    let mut rng = StdRng::seed_from_u64(0);
    let logits: Vec<f32> = (0..rows * num_classes).map(|_| rng.random_range(-8f32..8.)).collect();
    let labels: Vec<u32> = (0..rows).map(|_| rng.random_range(0..num_classes as u32)).collect();
    let logits = Tensor::from_vec(logits, (rows, num_classes), &Device::Cpu)?.to_dtype(dtype)?;
    Ok((Var::from_tensor(&logits)?, Tensor::from_vec(labels, rows, &Device::Cpu)?))
}

fn bench(criterion: &mut Criterion) {
    let fused = LabelSmoothingLoss::new(Smoothing::over_all(0.1).expect("a valid epsilon"));
    let ways: [(&str, Loss); 3] = [
        ("fused", &|logits, targets| Ok(fused.forward(logits, targets)?)),
        ("stock ops", &|logits, targets| Ok(reference::forward(&fused, logits, targets)?)),
        // Without smoothing, which it does not have.
        ("candle-nn", &candle_nn::loss::cross_entropy),
    ];
    for (rows, num_classes) in [(32, 3), (4096, 1000), (1024, 32_000)] {
        for dtype in [DType::F32, DType::BF16] {
            let (logits, targets) = inputs(rows, num_classes, dtype).expect("inputs");
            let bytes = (rows * num_classes * dtype.size_in_bytes()) as u64;
            let shape = format!("{rows}x{num_classes} {}", dtype.as_str());

            let mut group = criterion.benchmark_group("forward");
            group.sample_size(10).throughput(Throughput::Bytes(bytes));
            for (name, loss) in ways {
                group.bench_function(BenchmarkId::new(name, &shape), |b| {
                    b.iter(|| loss(&logits, &targets).expect("a loss"))
                });
            }
            group.finish();

            let mut group = criterion.benchmark_group("forward and backward");
            group.sample_size(10).throughput(Throughput::Bytes(bytes));
            for (name, loss) in ways {
                group.bench_function(BenchmarkId::new(name, &shape), |b| {
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
