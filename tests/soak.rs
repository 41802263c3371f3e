//! A long training with batches of every shape: memory stays constant, and losses stay close to the
//! reference's.
//!
//! `SOAK_STEPS=100000 cargo test --release --test soak -- --nocapture` runs more steps.

mod common;

use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, reference};
use candle_nn::{Optimizer, SGD};
use common::{CPU, random, random_labels, random_probabilities, smoothings, values};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const SIZE: usize = 8;
const CLASSES: usize = 300;

/// A loss as a function of hidden states, weight, bias and targets.
type Forward = fn(&LabelSmoothingLoss, [&Tensor; 4]) -> Result<Tensor>;

/// A model with its optimizer. Several of them train side by side.
struct Training {
    dtype: DType,
    weight: Var,
    bias: Var,
    forward: Forward,
    optimizer: SGD,
}

impl Training {
    fn new(dtype: DType, forward: Forward) -> Result<Self> {
        let weight = Var::from_tensor(&random(&[CLASSES, SIZE], 0.1, 1)?.to_dtype(dtype)?)?;
        let bias = Var::zeros(CLASSES, dtype, &CPU)?;
        let optimizer = SGD::new(vec![weight.clone(), bias.clone()], 0.1)?;
        Ok(Self { dtype, weight, bias, forward, optimizer })
    }

    /// Takes an optimizer step and returns the loss before it.
    fn step(
        &mut self,
        loss: &LabelSmoothingLoss,
        hidden: &Tensor,
        targets: &Tensor,
    ) -> Result<f64> {
        let hidden = hidden.to_dtype(self.dtype)?;
        let loss = (self.forward)(loss, [&hidden, &self.weight, &self.bias, targets])?;
        self.optimizer.backward_step(&loss)?;
        Ok(values(&loss)?[0])
    }
}

fn logits([hidden, weight, bias]: [&Tensor; 3]) -> Result<Tensor> {
    hidden.broadcast_matmul(&weight.t()?)?.broadcast_add(bias)
}

fn direct(
    loss: &LabelSmoothingLoss,
    [hidden, weight, bias, targets]: [&Tensor; 4],
) -> Result<Tensor> {
    Ok(loss.forward(&logits([hidden, weight, bias])?, targets)?)
}

fn linear(
    loss: &LabelSmoothingLoss,
    [hidden, weight, bias, targets]: [&Tensor; 4],
) -> Result<Tensor> {
    Ok(loss.forward_linear(hidden, weight, Some(bias), targets)?)
}

fn by_reference(
    loss: &LabelSmoothingLoss,
    [hidden, weight, bias, targets]: [&Tensor; 4],
) -> Result<Tensor> {
    Ok(reference::forward(loss, &logits([hidden, weight, bias])?, targets)?)
}

#[test]
fn memory_does_not_grow_and_results_do_not_drift() -> Result<()> {
    let steps = std::env::var("SOAK_STEPS").map_or(500, |steps| steps.parse().expect("a number"));
    let losses: Vec<LabelSmoothingLoss> = smoothings(CLASSES)?
        .into_iter()
        .map(|(_, smoothing)| LabelSmoothingLoss::new(smoothing))
        .flat_map(|loss| [loss.clone(), loss.with_reduction(Reduction::Sum)])
        .collect();
    let weights = random(&[CLASSES], 2., 2)?.abs()?;
    let mut trainings = [
        Training::new(DType::F64, by_reference)?,
        Training::new(DType::F64, direct)?,
        Training::new(DType::F64, linear)?,
        Training::new(DType::F32, direct)?,
    ];
    // Relative tolerance of every loss. The problem is convex, so training does not amplify
    // rounding errors.
    let tolerances = [0., 1e-12, 1e-12, 1e-5];
    let mut farthest = [0f64; 4];
    // Largest number of bytes held between steps, in each tenth of the training.
    let mut held = [0; 10];
    for step in 0..steps {
        let seed = 4 * step as u64 + 100;
        let length = 1 + step * 7 % 31;
        let rows = if step % 2 == 0 { vec![length] } else { vec![1 + step % 5, length] };
        let hidden = random(&[&rows[..], &[SIZE]].concat(), 1., seed)?;
        let mut loss = losses[step * 5 % losses.len()].clone().with_z_loss(1e-3)?;
        let targets = match step % 3 {
            0 => random_probabilities(&[&rows[..], &[CLASSES]].concat(), rows.len(), seed + 1)?,
            _ => random_labels(&rows, CLASSES, seed + 1)?,
        };
        if step % 3 == 1 {
            // The label of the first row is not ignored, so that the mean is not NaN.
            let first = targets.flatten_all()?.get(0)?.to_scalar::<i64>()?;
            loss = loss.with_ignore_index((first + 1) % 4).with_class_weights(&weights)?;
        }
        let mut results = [0.; 4];
        for (training, result) in trainings.iter_mut().zip(&mut results) {
            *result = training.step(&loss, &hidden, &targets)?;
        }
        for ((result, tolerance), farthest) in results.iter().zip(tolerances).zip(&mut farthest) {
            let apart = (result - results[0]).abs() / results[0].abs().max(1.);
            assert!(apart <= tolerance, "step {step}: {result}, reference {}", results[0]);
            *farthest = farthest.max(apart);
        }
        let tenth = &mut held[step * 10 / steps];
        drop((hidden, targets, loss));
        *tenth = ALLOCATOR.current_usage().max(*tenth);
    }
    println!("{steps} steps, held {held:?} bytes, farthest apart {farthest:?}");
    // The first steps fill pools and tables.
    let (early, late) = (held[1..4].iter().max(), held[7..].iter().max());
    assert!(late <= early.map(|early| early + 16 * 1024).as_ref(), "{held:?}");
    for (training, tolerance) in trainings.iter().zip(tolerances) {
        let exact = values(&trainings[0].weight)?;
        for (actual, exact) in values(&training.weight)?.iter().zip(exact) {
            assert!((actual - exact).abs() <= tolerance, "a weight: {actual}, reference {exact}");
        }
    }
    Ok(())
}
