//! Concurrent calls with the same loss and with different ones, in thread pools of different sizes.

mod common;

use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::testing::{self, TileSize};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing, smooth_targets};
use common::{random, random_labels, random_probabilities, smoothings, values};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::Barrier;
use std::thread;

/// Number of threads in each pool. A thread outside each pool waits for it.
const POOLS: [usize; 8] = [1, 2, 3, 5, 1, 2, 3, 5];

/// Inputs of one computation, f64.
struct Job {
    smoothing: Smoothing,
    loss: LabelSmoothingLoss,
    logits: Tensor,
    targets: Tensor,
    hidden: Tensor,
    weight: Tensor,
}

impl Job {
    /// Losses, gradients and soft targets in `dtype`.
    fn run(&self, dtype: DType) -> Result<Vec<Vec<f64>>> {
        let var = |tensor: &Tensor| Var::from_tensor(&tensor.to_dtype(dtype)?);
        let (logits, hidden, weight) = (var(&self.logits)?, var(&self.hidden)?, var(&self.weight)?);
        let Self { loss, targets, .. } = self;
        let direct = loss.forward(&logits, targets)?;
        let num_classes = logits.dims()[1];
        let tile = TileSize { rows: 70, classes: num_classes.div_ceil(3) };
        let linear = testing::forward_linear_tiled(loss, &hidden, &weight, None, targets, tile)?;
        let gradients = (&direct + &linear)?.sum_all()?.backward()?;
        let soft = smooth_targets(targets, num_classes, &self.smoothing)?;
        let gradients = [&logits, &hidden, &weight].map(|var| gradients.get(var));
        let results = [Some(&direct), Some(&linear), Some(&soft)].into_iter().chain(gradients);
        results.map(|result| values(result.expect("no gradient"))).collect()
    }
}

fn jobs() -> Result<Vec<Job>> {
    let mut jobs = Vec::new();
    // Less work than one thread's task, several tasks, and a row longer than a task.
    for (rows, num_classes) in [(5, 11), (200, 130), (2, 20_000)] {
        for (i, (_, smoothing)) in smoothings(num_classes)?.into_iter().enumerate() {
            let seed = 10 * i as u64;
            let loss = LabelSmoothingLoss::new(smoothing.clone())
                .with_class_weights(&random(&[num_classes], 2., seed)?.abs()?)?
                .with_reduction([Reduction::Mean, Reduction::None, Reduction::Sum][i % 3]);
            let targets = match i % 2 {
                0 => random_labels(&[rows], num_classes, seed + 1)?,
                _ => random_probabilities(&[rows, num_classes], 1, seed + 1)?,
            };
            jobs.push(Job {
                smoothing,
                loss,
                logits: random(&[rows, num_classes], 5., seed + 2)?,
                targets,
                hidden: random(&[rows, 3], 1., seed + 3)?,
                weight: random(&[num_classes, 3], 1., seed + 4)?,
            });
        }
    }
    Ok(jobs)
}

/// All threads start together on a loss that is not used yet, so that they compete to create its
/// cached tables. They then go through the other losses in different orders.
#[test]
fn concurrent_calls_give_the_same_bits() -> Result<()> {
    const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];
    let pool = |threads| ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
    let expected: Vec<_> = {
        let (jobs, pool) = (jobs()?, pool(1));
        let run = |job: &Job| pool.install(|| DTYPES.iter().map(|&dtype| job.run(dtype)).collect());
        jobs.iter().map(run).collect::<Result<Vec<Vec<_>>>>()?
    };
    let pools: [ThreadPool; POOLS.len()] = POOLS.map(pool);
    for _ in 0..2 {
        let (jobs, barrier) = (jobs()?, Barrier::new(POOLS.len()));
        thread::scope(|scope| {
            for (thread, pool) in pools.iter().enumerate() {
                let (jobs, expected, barrier) = (&jobs, &expected, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    for i in 0..jobs.len() * DTYPES.len() {
                        // All threads start with the first computation. Their later orders differ,
                        // except for threads with equal strides.
                        let i = i * [1, 5, 11, 13][thread % 4] % (jobs.len() * DTYPES.len());
                        let (job, dtype) = (i / DTYPES.len(), i % DTYPES.len());
                        let results = pool.install(|| jobs[job].run(DTYPES[dtype]));
                        let results = results.expect("an error");
                        let same = |(a, b): (&f64, &f64)| a.to_bits() == b.to_bits();
                        for (actual, expected) in results.iter().zip(&expected[job][dtype]) {
                            let name = format!("job {job} in {:?}, pool {thread}", DTYPES[dtype]);
                            assert_eq!(actual.len(), expected.len(), "{name}");
                            assert!(actual.iter().zip(expected).all(same), "{name}");
                        }
                    }
                });
            }
        });
    }
    Ok(())
}
