//! Trains the language model of `char_lm` on several processes, which exchange tensors by MPI, in two ways, and compares both
//! with the training on one process:
//!
//! - data-parallel: every process has the whole model and a part of each batch;
//! - vocabulary-parallel: every process has whole batches and a part of the classes. `forward_linear_shard` computes the loss.
//!
//! On Debian, in the folder of this package:
//!
//! ```sh
//! apt-get install --no-install-recommends libclang-dev libopenmpi-dev openmpi-bin
//! cargo build --release
//! mpirun -n 2 target/release/ranks
//! ```
//!
//! For more processes than cores, `mpirun` needs `--oversubscribe`. `target/release/ranks --help` lists the options. The model has
//! dtype f64, so that a difference is a mistake and not a rounding. If a loss or a weight differs by more than 1e-9, the program
//! fails.

mod model;
mod processes;
mod training;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor, backprop::GradStore};
use candle_label_smoothing::{LabelSmoothingLoss, Shard, Smoothing, check_shards};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use clap::{Parser, value_parser};
use model::{Batch, IGNORED, Model, classes_of};
use mpi::Threading;
use processes::{Cost, Processes};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const TEXT: &str = include_str!("../../char_lm/northanger_abbey.txt");
/// The largest difference of a loss or a weight from that of one process.
const TOLERANCE: f64 = 1e-9;

/// Trains a language model on one process, data-parallel and vocabulary-parallel, and compares the results.
#[derive(Parser)]
struct Args {
    /// Steps of the optimizer
    #[arg(long, default_value_t = 200, value_parser = value_parser!(u32).range(1..))]
    steps: u32,
    /// Passages in one step
    #[arg(long, default_value_t = 15, value_parser = value_parser!(u32).range(1..=4096))]
    batch_size: u32,
    /// Characters of a passage
    #[arg(long, default_value_t = 32, value_parser = value_parser!(u32).range(1..=4096))]
    length: u32,
    /// Units of the hidden layer
    #[arg(long, default_value_t = 64, value_parser = value_parser!(u32).range(1..=4096))]
    hidden: u32,
    /// Classes of a process are a multiple of this number, but the last processes have what is left, or none
    #[arg(long, default_value_t = 1, value_parser = value_parser!(u32).range(1..))]
    multiple: u32,
    /// How much of each target is spread over all characters, as often as they occur, from 0 to 1
    #[arg(long, default_value_t = 0.02)]
    epsilon: f64,
    /// Learning rate
    #[arg(long, default_value_t = 1e-2)]
    lr: f64,
    /// Seed of the weights and the passages
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// What a way of training gives.
struct Outcome {
    model: Model,
    /// The loss of each step.
    losses: Tensor,
    time: Duration,
    cost: Cost,
}

/// Trains `model` by `step`, which gives the loss of a batch and its gradients.
fn train(
    model: Model,
    batches: &[Batch],
    lr: f64,
    processes: &Processes,
    step: impl Fn(&Model, &Batch) -> Result<(Tensor, GradStore)>,
) -> Result<Outcome> {
    let params = ParamsAdamW { lr, ..ParamsAdamW::default() };
    let mut variables = model.variables();
    // A process may have no classes. candle cannot set a variable without elements.
    variables.retain(|variable| variable.elem_count() > 0);
    let mut optimizer = AdamW::new(variables, params)?;
    let (start, mut losses) = (Instant::now(), Vec::new());
    processes.take_cost();
    for batch in batches {
        let (loss, gradients) = step(&model, batch)?;
        optimizer.step(&gradients)?;
        losses.push(loss.to_scalar::<f64>()?);
    }
    let (time, cost) = (start.elapsed(), processes.take_cost());
    Ok(Outcome { model, losses: Tensor::new(losses, &Device::Cpu)?, time, cost })
}

/// The largest absolute difference between numbers of two tensors, on any process.
fn difference(a: &Tensor, b: &Tensor, processes: &Processes) -> Result<f64> {
    let differences = (a - b)?.abs()?.to_vec1::<f64>()?;
    // `max` would drop a NaN.
    let differences = differences.into_iter().map(|d| if d.is_nan() { f64::INFINITY } else { d });
    let here = Tensor::new(differences.fold(0., f64::max), &Device::Cpu)?;
    Ok(processes.gather(&here)?.max(0)?.to_scalar()?)
}

fn run(args: &Args, processes: &Processes) -> Result<()> {
    ensure!(args.lr > 0. && args.lr.is_finite(), "--lr is {}, expected more than 0", args.lr);
    let (text, frequencies) = classes_of(TEXT);
    let num_classes = frequencies.len();
    let prior = Tensor::from_vec(frequencies, num_classes, &Device::Cpu)?;
    let smoothing = Smoothing::toward(args.epsilon, &prior).context("--epsilon cannot be used")?;
    let criterion = LabelSmoothingLoss::new(smoothing).with_ignore_index(IGNORED);

    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let (batch_size, length) = (args.batch_size as usize, args.length as usize);
    let batches: Result<Vec<_>> =
        (0..args.steps).map(|_| Batch::draw(&text, batch_size, length, &mut rng)).collect();
    let batches = batches?;
    let model = || Model::new(num_classes, args.hidden as usize, rng.clone());

    // Process 0 trains alone, while the others wait for its losses and weights.
    let mut alone = train(model()?, &batches, args.lr, processes, |model, batch| {
        if processes.rank() == 0 {
            training::alone(model, batch, &criterion)
        } else {
            Ok((Tensor::new(0f64, &Device::Cpu)?, GradStore::default()))
        }
    })?;
    alone.losses = processes.broadcast(&alone.losses)?;
    for variable in alone.model.variables() {
        variable.set(&processes.broadcast(&variable)?)?;
    }

    let data = train(model()?, &batches, args.lr, processes, |model, batch| {
        training::data_parallel(model, batch, &criterion, processes)
    })?;

    let classes = processes.part(num_classes, args.multiple as usize);
    let shard = Shard { first_class: classes.start, num_classes };
    // Processes that disagree would compute something wrong, or wait for each other. One check before the first step finds it.
    check_shards(&batches[0].targets, shard, classes.len(), |tensor| processes.gather(tensor))?;
    let vocabulary =
        train(model()?.shard(&classes)?, &batches, args.lr, processes, |model, batch| {
            training::vocabulary_parallel(model, batch, &criterion, shard, processes)
        })?;

    // The differences of losses and weights from those of process 0 alone.
    let differences = |outcome: &Outcome, classes| -> Result<[f64; 2]> {
        let weights = alone.model.shard(classes)?.weights()?;
        Ok([
            difference(&outcome.losses, &alone.losses, processes)?,
            difference(&outcome.model.weights()?, &weights, processes)?,
        ])
    };
    let rows = [
        ("one process", &alone, differences(&alone, &(0..num_classes))?),
        ("data-parallel", &data, differences(&data, &(0..num_classes))?),
        ("vocabulary-parallel", &vocabulary, differences(&vocabulary, &classes)?),
    ];
    if processes.rank() == 0 {
        println!("processes: {}, steps: {}, classes: {num_classes}", processes.size(), args.steps);
        println!("                          largest difference of       one step of process 0");
        println!("                    last loss   losses  weights  bytes to MPI     ms  ms in MPI");
        for (name, Outcome { losses, time, cost, .. }, differences) in &rows {
            let last = losses.get(batches.len() - 1)?.to_scalar::<f64>()?;
            let bytes = cost.bytes / batches.len();
            let [time, in_mpi] =
                [time, &cost.time].map(|t| 1e3 * t.as_secs_f64() / f64::from(args.steps));
            let [of_losses, of_weights] = differences;
            println!(
                "{name:19} {last:9.6} {of_losses:8.1e} {of_weights:8.1e} {bytes:13} {time:6.1} {in_mpi:10.1}",
            );
        }
    }
    // The table is printed before an error ends all processes.
    processes.wait();
    for (name, _, [of_losses, of_weights]) in rows {
        let largest = of_losses.max(of_weights);
        ensure!(largest <= TOLERANCE, "{name} differs by {largest:.1e}, more than {TOLERANCE:e}");
    }
    Ok(())
}

fn main() -> ExitCode {
    let args = Args::parse();
    // Only the main thread calls MPI.
    let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else {
        eprintln!("MPI does not start");
        return ExitCode::FAILURE;
    };
    let processes = Processes::new(universe.world());
    if let Err(error) = run(&args, &processes) {
        // One string, so that messages of several processes do not mix.
        let message = format!("Error of process {}: {error:#}\n", processes.rank());
        eprint!("{message}");
        processes.abort();
    }
    ExitCode::SUCCESS
}
