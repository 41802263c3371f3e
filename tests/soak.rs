//! A long training by every entry point, with batches of changing shapes and with all options but `class_dim`: memory stays
//! constant, and losses stay close to the reference's.
//!
//! `SOAK_STEPS=50000 cargo test --release --test soak -- --nocapture` runs more steps.

mod common;

use candle_core::{D, DType, Result, Tensor, Var};
use candle_label_smoothing::testing::{self, TileSize};
use candle_label_smoothing::{LabelSmoothingLoss, Metrics, Reduction, Shard, Smoothing, reference};
use candle_nn::ops::softmax;
use candle_nn::{Optimizer, SGD};
use common::compare::assert_close;
use common::processes::{Process, part, run, shard, targets_of};
use common::{CPU, random, random_labels, random_probabilities, smoothings, values};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const SIZE: usize = 5;
const CLASSES: usize = 83;
/// The number of the last classes that are masked in some steps. No target has them.
const MASKED: usize = 5;

// ---- The entry points

/// A way to compute the loss, with which a model trains.
struct EntryPoint {
    name: &'static str,
    dtype: DType,
    /// The numbers of classes of the processes.
    split: &'static [usize],
    forward: fn(&Batch, &Inputs) -> Result<Tensor>,
}

const ONE: &[usize] = &[CLASSES];
const TWO: &[usize] = &[30, CLASSES - 30];

/// The first one is the reference. An entry point with metrics follows the one without them, and has its bits.
#[rustfmt::skip]
const ENTRY_POINTS: [EntryPoint; 11] = [
    EntryPoint { name: "reference", dtype: DType::F64, split: ONE, forward: by_reference },
    EntryPoint { name: "forward", dtype: DType::F64, split: ONE, forward },
    EntryPoint { name: "forward_with_metrics", dtype: DType::F64, split: ONE, forward: forward_with_metrics },
    EntryPoint { name: "forward in f32", dtype: DType::F32, split: ONE, forward },
    EntryPoint { name: "forward_linear", dtype: DType::F64, split: ONE, forward: linear },
    EntryPoint { name: "forward_linear_with_metrics", dtype: DType::F64, split: ONE, forward: linear_with_metrics },
    EntryPoint { name: "forward_linear in f32", dtype: DType::F32, split: ONE, forward: linear },
    EntryPoint { name: "forward_linear in tiles", dtype: DType::F64, split: ONE, forward: linear_in_tiles },
    EntryPoint { name: "forward_linear in tiles in f32", dtype: DType::F32, split: ONE, forward: linear_in_tiles },
    EntryPoint { name: "forward_shard", dtype: DType::F64, split: TWO, forward: of_shard },
    EntryPoint { name: "forward_linear_shard", dtype: DType::F64, split: TWO, forward: linear_of_shard },
];

impl EntryPoint {
    /// The relative error allowed in every loss, and the absolute one in the weights. Without a softcap the problem is convex, so
    /// training does not amplify rounding errors. With the softcap of some steps it does not either: the differences after 50 000
    /// steps are a hundred times smaller in f64, and ten times in f32.
    fn tolerance(&self) -> f64 {
        if self.dtype == DType::F64 { 1e-12 } else { 1e-5 }
    }
}

/// What one process of a training has in a step.
struct Inputs<'a> {
    hidden: Tensor,
    weight: &'a Tensor,
    bias: Tensor,
    targets: Tensor,
    shard: Shard,
    /// `None` if there is one process.
    process: Option<&'a Process>,
}

impl Inputs<'_> {
    fn logits(&self) -> Result<Tensor> {
        self.hidden.broadcast_matmul(&self.weight.t()?)?.broadcast_add(&self.bias)
    }

    fn gather(&self, tensor: &Tensor) -> Result<Tensor> {
        self.process.expect("several processes").gather(tensor)
    }
}

fn by_reference(batch: &Batch, inputs: &Inputs) -> Result<Tensor> {
    Ok(reference::forward(&batch.loss, &inputs.logits()?, &inputs.targets)?)
}

fn forward(batch: &Batch, inputs: &Inputs) -> Result<Tensor> {
    Ok(batch.loss.forward(&inputs.logits()?, &inputs.targets)?)
}

/// Probabilities have no metrics.
fn forward_with_metrics(batch: &Batch, inputs: &Inputs) -> Result<Tensor> {
    if !inputs.targets.dtype().is_int() {
        return forward(batch, inputs);
    }
    let logits = inputs.logits()?;
    let (loss, metrics) = batch.loss.forward_with_metrics(&logits, &inputs.targets)?;
    batch.check_metrics(&logits, &metrics)?;
    Ok(loss)
}

fn linear(batch: &Batch, inputs: &Inputs) -> Result<Tensor> {
    let Inputs { hidden, weight, bias, targets, .. } = inputs;
    Ok(batch.loss.forward_linear(hidden, weight, Some(bias), targets)?)
}

fn linear_with_metrics(batch: &Batch, inputs: &Inputs) -> Result<Tensor> {
    let Inputs { hidden, weight, bias, targets, .. } = inputs;
    if !targets.dtype().is_int() {
        return linear(batch, inputs);
    }
    let (loss, metrics) =
        batch.loss.forward_linear_with_metrics(hidden, weight, Some(bias), targets)?;
    batch.check_metrics(&inputs.logits()?, &metrics)?;
    Ok(loss)
}

/// Several tiles of rows and of classes. The logits of some rows are kept, or none.
fn linear_in_tiles(batch: &Batch, inputs: &Inputs) -> Result<Tensor> {
    let tile = TileSize { rows: 16, classes: 32 };
    let Inputs { hidden, weight, bias, targets, .. } = inputs;
    let (loss, budget) = (&batch.loss, batch.logits_budget);
    Ok(testing::forward_linear_tiled_within_budget(
        loss,
        hidden,
        weight,
        Some(bias),
        targets,
        tile,
        budget,
    )?)
}

fn of_shard(batch: &Batch, inputs: &Inputs) -> Result<Tensor> {
    let logits = inputs.logits()?;
    let gather = |t: &Tensor| inputs.gather(t);
    Ok(batch.loss.forward_shard(&logits, &inputs.targets, inputs.shard, gather)?)
}

fn linear_of_shard(batch: &Batch, inputs: &Inputs) -> Result<Tensor> {
    let Inputs { hidden, weight, bias, targets, .. } = inputs;
    let gather = |t: &Tensor| inputs.gather(t);
    Ok(batch.loss.forward_linear_shard(
        hidden,
        weight,
        Some(bias),
        targets,
        inputs.shard,
        gather,
    )?)
}

// ---- The batches

/// What all trainings get in a step.
struct Batch {
    loss: LabelSmoothingLoss,
    hidden: Tensor,
    targets: Tensor,
    /// A number for each class that is added to the logits: 0, or −inf.
    mask: Tensor,
    scale: f64,
    softcap: Option<f64>,
    /// 1 for each row that counts, else 0.
    counted: Tensor,
    logits_budget: usize,
}

impl Batch {
    fn new(step: usize, losses: &[(Tensor, LabelSmoothingLoss)]) -> Result<Self> {
        let seed = 4 * step as u64 + 100;
        let length = 1 + step * 7 % 23;
        let rows = match step / 3 % 2 {
            0 => vec![length],
            _ => vec![1 + step / 4 % 3, length],
        };
        let dims = |last: usize| [&rows[..], &[last]].concat();
        let (mask, loss) = losses[step * 5 % losses.len()].clone();
        let targets =
            match step % 3 {
                0 => random_probabilities(&dims(CLASSES - MASKED), rows.len(), seed)?
                    .pad_with_zeros(rows.len(), 0, MASKED)?,
                _ => random_labels(&rows, CLASSES - MASKED, seed)?,
            };
        // None of the tiles' logits are kept, or those of up to 64 rows.
        let logits_budget = [0, 64 * CLASSES * size_of::<f64>()][step / 2 % 2];
        let (scale, softcap) =
            [(1., None), (1.5, None), (1., Some(2.)), (0.5, Some(5.))][step / 5 % 4];
        let hidden = random(&dims(SIZE), 1., seed + 1)?;
        let counted = Tensor::ones(rows, DType::F64, &CPU)?;
        let batch = Self { loss, hidden, targets, mask, scale, softcap, counted, logits_budget };
        batch.with_options(step)
    }

    fn with_options(mut self, step: usize) -> Result<Self> {
        let mut loss = self.loss.with_z_loss(1e-3)?.with_logit_scale(self.scale)?;
        if let Some(cap) = self.softcap {
            loss = loss.with_softcap(cap)?;
        }
        if step % 3 == 1 {
            // The label of the first row is not ignored, so that the mean is not NaN.
            let first = self.targets.flatten_all()?.get(0)?.to_scalar::<i64>()?;
            let index = (first + 1) % 4;
            let class_weights = (random(&[CLASSES], 2., 2)?.abs()? + 0.1)?;
            loss = loss.with_ignore_index(index).with_class_weights(&class_weights)?;
            self.counted = self.targets.ne(index)?.to_dtype(DType::F64)?;
        }
        if step % 5 == 2 {
            let row_weights = (0..self.counted.elem_count()).map(|row| [1.5, 0., 0.7][row % 3]);
            let row_weights =
                Tensor::from_iter(row_weights, &CPU)?.reshape(self.counted.shape())?;
            loss = loss.weigh_rows(&row_weights)?;
            self.counted = (self.counted * row_weights.ne(0.)?.to_dtype(DType::F64)?)?;
        }
        Ok(Self { loss, ..self })
    }

    /// Compares the metrics with the formula. A row that does not count has zeros.
    fn check_metrics(&self, logits: &Tensor, metrics: &Metrics) -> Result<()> {
        let mut x = (logits.detach() * self.scale)?;
        if let Some(cap) = self.softcap {
            // A masked class stays masked.
            x = ((x / cap)?.tanh()? * cap)?.broadcast_add(&self.mask)?;
        }
        let lse = x.log_sum_exp(D::Minus1)?;
        let labels = self.targets.unsqueeze(D::Minus1)?;
        let nll = (&lse - x.gather(&labels, D::Minus1)?.squeeze(D::Minus1)?)?;
        let prediction = x.argmax(D::Minus1)?;
        let correct = prediction.to_dtype(DType::I64)?.eq(&self.targets)?.to_dtype(DType::F64)?;
        let confidence = (x.max(D::Minus1)? - &lse)?.exp()?;
        // A masked class has the probability 0.
        let finite = x.maximum(f64::MIN)?;
        let entropy = (&lse - (softmax(&x, D::Minus1)? * finite)?.sum(D::Minus1)?)?;
        for (name, actual, expected) in [
            ("nll", &metrics.nll, nll),
            ("prediction", &metrics.prediction, prediction.to_dtype(DType::F64)?),
            ("correct", &metrics.correct, correct),
            ("confidence", &metrics.confidence, confidence),
            ("entropy", &metrics.entropy, entropy),
            ("lse", &metrics.lse, lse),
            ("counted", &metrics.counted, self.counted.clone()),
        ] {
            let expected = values(&(expected * &self.counted)?)?;
            assert_close(name, &values(actual)?, &expected, 1e-12, 1e-12);
        }
        Ok(())
    }
}

/// Every smoothing and reduction, with the mask of the classes. A smoothing over the unmasked classes comes with masked ones.
fn losses() -> Result<Vec<(Tensor, LabelSmoothingLoss)>> {
    let mask: Vec<f64> = (0..CLASSES)
        .map(|class| if class < CLASSES - MASKED { 0. } else { f64::NEG_INFINITY })
        .collect();
    let mut smoothings: Vec<(Tensor, Smoothing)> = Vec::new();
    for (_, smoothing) in self::smoothings(CLASSES)? {
        smoothings.push((Tensor::zeros(CLASSES, DType::F64, &CPU)?, smoothing));
    }
    smoothings.push((Tensor::new(mask, &CPU)?, Smoothing::over_unmasked(0.2)?));
    let reductions = [Reduction::Mean, Reduction::None, Reduction::Sum, Reduction::MeanOrZero];
    let with_reductions = smoothings.into_iter().flat_map(|(mask, smoothing)| {
        let loss = LabelSmoothingLoss::new(smoothing);
        reductions.map(|reduction| (mask.clone(), loss.clone().with_reduction(reduction)))
    });
    Ok(with_reductions.collect())
}

// ---- The training

/// A model that trains by an entry point, side by side with the others.
struct Training {
    entry_point: &'static EntryPoint,
    /// The weight and the bias of each process.
    models: Vec<(Var, Var)>,
    /// The largest relative distance of a loss from the reference's.
    farthest: f64,
}

impl Training {
    fn new(entry_point: &'static EntryPoint) -> Result<Self> {
        let EntryPoint { dtype, split, .. } = *entry_point;
        let weight = random(&[CLASSES, SIZE], 0.1, 1)?.to_dtype(dtype)?;
        let model = |rank| -> Result<(Var, Var)> {
            let weight = Var::from_tensor(&part(&weight, 0, split, rank)?)?;
            Ok((weight, Var::zeros(split[rank], dtype, &CPU)?))
        };
        let models = (0..split.len()).map(model).collect::<Result<_>>()?;
        Ok(Self { entry_point, models, farthest: 0. })
    }

    /// Takes an optimizer step on every process, and returns the losses before it.
    fn step(&self, batch: &Batch) -> Result<Vec<f64>> {
        match self.models.len() {
            1 => self.step_of_process(0, None, batch),
            count => {
                let step =
                    |process: &Process| self.step_of_process(process.rank, Some(process), batch);
                let losses = run(count, step).into_iter().collect::<Result<Vec<_>>>()?;
                assert!(losses.iter().all(|loss| *loss == losses[0]), "{losses:?}");
                Ok(losses[0].clone())
            }
        }
    }

    fn step_of_process(
        &self,
        rank: usize,
        process: Option<&Process>,
        batch: &Batch,
    ) -> Result<Vec<f64>> {
        let EntryPoint { dtype, split, forward, .. } = *self.entry_point;
        let (weight, bias) = &self.models[rank];
        let mask = part(&batch.mask, 0, split, rank)?.to_dtype(dtype)?;
        let inputs = Inputs {
            hidden: batch.hidden.to_dtype(dtype)?,
            weight,
            bias: (bias.as_tensor() + mask)?,
            targets: targets_of(&batch.targets, batch.hidden.rank() - 1, split, rank)?,
            shard: shard(split, rank),
            process,
        };
        let loss = forward(batch, &inputs)?;
        // The optimizer has no state.
        SGD::new(vec![weight.clone(), bias.clone()], 0.1)?.backward_step(&loss)?;
        values(&loss)
    }

    /// The weights and biases of all processes.
    fn parameters(&self) -> Result<Vec<f64>> {
        let weights = self.models.iter().map(|(weight, _)| weight.as_tensor());
        let biases = self.models.iter().map(|(_, bias)| bias.as_tensor());
        let all = weights.chain(biases).map(values).collect::<Result<Vec<_>>>()?;
        Ok(all.concat())
    }
}

/// A step of every training. Every loss must be close to that of the reference, which is the first.
fn step_all(step: usize, trainings: &mut [Training], batch: &Batch) -> Result<()> {
    let exact = trainings[0].step(batch)?;
    for training in &mut trainings[1..] {
        let EntryPoint { name, .. } = training.entry_point;
        let losses = training.step(batch)?;
        assert_eq!(losses.len(), exact.len(), "{name}");
        for (loss, exact) in losses.iter().zip(&exact) {
            let apart = (loss - exact).abs() / exact.abs().max(1.);
            let is_close = apart <= training.entry_point.tolerance();
            assert!(is_close, "step {step}, {name}: {loss}, reference {exact}");
            training.farthest = training.farthest.max(apart);
        }
    }
    Ok(())
}

fn check_parameters(trainings: &[Training]) -> Result<()> {
    let exact = trainings[0].parameters()?;
    for training in trainings {
        let EntryPoint { name, .. } = training.entry_point;
        let tolerance = training.entry_point.tolerance();
        assert_close(name, &training.parameters()?, &exact, tolerance, 0.);
    }
    for pair in trainings.windows(2) {
        let name = pair[1].entry_point.name;
        if name.ends_with("_with_metrics") {
            assert_eq!(pair[1].parameters()?, pair[0].parameters()?, "{name}");
        }
    }
    Ok(())
}

#[test]
fn memory_does_not_grow_and_results_do_not_drift() -> Result<()> {
    let steps = std::env::var("SOAK_STEPS").map_or(200, |steps| steps.parse().expect("a number"));
    assert!(steps >= 100, "got {steps} steps, expected at least 100");
    let losses = losses()?;
    let mut trainings = ENTRY_POINTS.iter().map(Training::new).collect::<Result<Vec<_>>>()?;
    // Largest number of bytes held between steps, in each tenth of the training.
    let mut held = [0; 10];
    for step in 0..steps {
        step_all(step, &mut trainings, &Batch::new(step, &losses)?)?;
        let tenth = &mut held[step * 10 / steps];
        *tenth = ALLOCATOR.current_usage().max(*tenth);
    }
    println!("{steps} steps, held {held:?} bytes, farthest apart:");
    for Training { entry_point, farthest, .. } in &trainings {
        println!("{:32} {farthest:.1e}", entry_point.name);
    }
    // The first steps fill pools and tables.
    let (early, late) = (held[1..4].iter().max(), held[7..].iter().max());
    assert!(late <= early.map(|early| early + 1024).as_ref(), "{held:?}");
    check_parameters(&trainings)
}
