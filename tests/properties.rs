//! What holds of any cross-entropy, for random shapes, classes anywhere, and random options, in f64.

mod common;

use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::testing::{self, TileSize};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing, reference, smooth_targets};
use common::{CPU, random, random_labels, random_probabilities, values};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

/// Which smoothing, by its numbers, so that a failure shows them.
#[derive(Clone, Copy, Debug)]
enum Convention {
    None,
    All(f64),
    Others(f64),
    Toward(f64),
}

/// One loss to compute.
#[derive(Clone, Debug)]
struct Example {
    dims: Vec<usize>,
    class_dim: usize,
    convention: Convention,
    weighted: bool,
    ignores: bool,
    z_loss: f64,
    /// Probabilities in place of labels.
    soft: bool,
    range: f64,
    seed: u64,
}

impl Example {
    fn num_classes(&self) -> usize {
        self.dims[self.class_dim]
    }

    fn rows(&self) -> Vec<usize> {
        let mut rows = self.dims.clone();
        rows.remove(self.class_dim);
        rows
    }

    fn num_rows(&self) -> usize {
        self.rows().iter().product()
    }

    fn smoothing(&self) -> Result<Smoothing> {
        Ok(match self.convention {
            Convention::None => Smoothing::none(),
            Convention::All(epsilon) => Smoothing::over_all(epsilon)?,
            Convention::Others(epsilon) if self.num_classes() > 1 => {
                Smoothing::over_others(epsilon)?
            }
            Convention::Others(_) => Smoothing::none(),
            Convention::Toward(epsilon) => {
                let prior = random_probabilities(&[self.num_classes()], 0, self.seed + 3)?;
                Smoothing::toward(epsilon, &prior)?
            }
        })
    }

    fn weights(&self) -> Result<Tensor> {
        random(&[self.num_classes()], 1., self.seed + 4)?.abs()
    }

    fn loss(&self, reduction: Reduction) -> Result<LabelSmoothingLoss> {
        let mut loss = LabelSmoothingLoss::new(self.smoothing()?)
            .with_class_dim(self.class_dim)
            .with_reduction(reduction)
            .with_z_loss(self.z_loss)?;
        if self.weighted {
            loss = loss.with_class_weights(&self.weights()?)?;
        }
        if self.ignores && !self.soft {
            loss = loss.with_ignore_index(0);
        }
        Ok(loss)
    }

    fn logits(&self) -> Result<Tensor> {
        random(&self.dims, self.range, self.seed)
    }

    fn labels(&self) -> Result<Tensor> {
        random_labels(&self.rows(), self.num_classes(), self.seed + 1)
    }

    fn targets(&self) -> Result<Tensor> {
        match self.soft {
            true => random_probabilities(&self.dims, self.class_dim, self.seed + 2),
            false => self.labels(),
        }
    }

    /// The classes last: (rows, classes).
    fn by_row(&self, tensor: &Tensor) -> Result<Tensor> {
        let mut dims: Vec<usize> =
            (0..tensor.rank()).filter(|dim| *dim != self.class_dim).collect();
        dims.push(self.class_dim);
        tensor.permute(dims)?.reshape((self.num_rows(), self.num_classes()))
    }
}

fn example() -> impl Strategy<Value = Example> {
    let convention = prop_oneof![
        Just(Convention::None),
        (0f64..=1.).prop_map(Convention::All),
        (0f64..=1.).prop_map(Convention::Others),
        (0f64..=1.).prop_map(Convention::Toward),
    ];
    let dims = prop_oneof![
        prop::collection::vec(1usize..6, 1..5),
        prop::collection::vec(1usize..70, 2..3),
        prop::collection::vec(250usize..600, 1..2),
    ];
    (dims, any::<prop::sample::Index>(), convention, any::<[bool; 4]>(), 0.1f64..30., 0u64..1 << 40)
        .prop_map(|(dims, class_dim, convention, flags, range, seed)| {
            let class_dim = class_dim.index(dims.len());
            let [weighted, ignores, has_z, soft] = flags;
            let z_loss = if has_z { 0.01 } else { 0. };
            Example { dims, class_dim, convention, weighted, ignores, z_loss, soft, range, seed }
        })
}

/// The loss and the logits' gradient of its sum.
fn run(loss: &LabelSmoothingLoss, logits: &Tensor, targets: &Tensor) -> Result<(Tensor, Tensor)> {
    let logits = Var::from_tensor(logits)?;
    let result = loss.forward(&logits, targets)?;
    let gradients = result.sum_all()?.backward()?;
    Ok((result, gradients.get(&logits).expect("no gradient").clone()))
}

fn close(what: &str, ours: &Tensor, theirs: &Tensor) -> std::result::Result<(), TestCaseError> {
    let (ours, theirs) = (numbers(ours)?, numbers(theirs)?);
    prop_assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(theirs) {
        let close = (ours - theirs).abs() <= 1e-11 * theirs.abs().max(1.);
        prop_assert!(close || ours.is_nan() && theirs.is_nan(), "{what}: {ours} and {theirs}");
    }
    Ok(())
}

fn numbers(tensor: &Tensor) -> std::result::Result<Vec<f64>, TestCaseError> {
    Ok(values(tensor)?)
}

/// Runs a property, whose errors of candle's fail it.
macro_rules! property {
    ($($(#[$doc:meta])* fn $name:ident($example:ident) $body:block)*) => {
        proptest! {
            #![proptest_config(ProptestConfig {
                failure_persistence: None,
                ..ProptestConfig::with_cases(128)
            })]
            $(
                $(#[$doc])*
                #[test]
                fn $name($example in example()) $body
            )*
        }
    };
}

property! {
    fn fused_is_the_reference(example) {
        for reduction in [Reduction::None, Reduction::Sum, Reduction::Mean] {
            let loss = example.loss(reduction)?;
            let (logits, targets) = (example.logits()?, example.targets()?);
            let (ours, gradient) = run(&loss, &logits, &targets)?;
            let var = Var::from_tensor(&logits)?;
            let theirs = reference::forward(&loss, &var, &targets)?;
            close("loss", &ours, &theirs)?;
            // Without a row that counts, the mean is NaN, but the gradient is 0.
            if numbers(&ours)?.iter().all(|loss| loss.is_finite()) {
                let gradients = theirs.sum_all().and_then(|sum| sum.backward())?;
                close("gradient", &gradient, gradients.get(&var).expect("a gradient"))?;
            }
        }
    }

    /// To S·(1 − 1) without z-loss, and with it to 2·z·lse.
    fn gradient_rows_sum_to_their_known_value(example) {
        let loss = example.loss(Reduction::None)?;
        let (logits, targets) = (example.logits()?, example.targets()?);
        let (_, gradient) = run(&loss, &logits, &targets)?;
        let sums = example.by_row(&gradient).and_then(|rows| rows.sum(1))?;
        let lse = example.by_row(&logits).and_then(|rows| rows.log_sum_exp(1))?;
        let ignored = match example.ignores && !example.soft {
            true => numbers(&targets)?.iter().map(|label| *label == 0.).collect(),
            false => vec![false; example.num_rows()],
        };
        for ((sum, lse), ignored) in numbers(&sums)?.iter().zip(numbers(&lse)?).zip(ignored) {
            let expected = if ignored { 0. } else { 2. * example.z_loss * lse };
            prop_assert!((sum - expected).abs() < 1e-12 * (1. + lse.abs()), "{sum}, not {expected}");
        }
    }

    fn a_constant_changes_nothing_but_z_loss(example) {
        let example = Example { z_loss: 0., ..example };
        let loss = example.loss(Reduction::None)?;
        let (logits, targets) = (example.logits()?, example.targets()?);
        // A power of two, so that the sum is hardly rounded.
        let moved = (&logits + 1024.)?;
        let (ours, theirs) = (run(&loss, &moved, &targets), run(&loss, &logits, &targets));
        let (ours, theirs) = (ours?, theirs?);
        close("loss", &ours.0, &theirs.0)?;
        close("gradient", &ours.1, &theirs.1)?;
    }

    /// Of probabilities; class weights and a prior would have to be permuted as well.
    fn a_permutation_of_classes_permutes_the_gradient(example) {
        let convention = match example.convention {
            Convention::Toward(epsilon) => Convention::All(epsilon),
            other => other,
        };
        let example = Example { weighted: false, soft: true, convention, ..example };
        let loss = example.loss(Reduction::None)?;
        let (logits, targets) = (example.logits()?, example.targets()?);
        let reversed: Vec<u32> = (0..example.num_classes() as u32).rev().collect();
        let order = Tensor::from_vec(reversed, example.num_classes(), &CPU)?;
        let permuted = |tensor: &Tensor| tensor.index_select(&order, example.class_dim);
        let theirs = run(&loss, &logits, &targets)?;
        let (logits, targets) = (permuted(&logits)?, permuted(&targets)?);
        let ours = run(&loss, &logits, &targets)?;
        close("loss", &ours.0, &theirs.0)?;
        close("gradient", &ours.1, &permuted(&theirs.1)?)?;
    }

    fn none_summed_is_sum(example) {
        let (logits, targets) = (example.logits()?, example.targets()?);
        let of = |reduction| run(&example.loss(reduction)?, &logits, &targets);
        let (none, sum) = (of(Reduction::None)?, of(Reduction::Sum)?);
        close("loss", &sum.0, &none.0.sum_all()?)?;
        close("gradient", &sum.1, &none.1)?;
    }

    fn over_others_is_over_all_of_a_larger_epsilon(example) {
        let classes = example.num_classes() as f64;
        prop_assume!(classes > 1.);
        let others = 0.7 * (classes - 1.) / classes;
        let (logits, targets) = (example.logits()?, example.targets()?);
        let of = |convention| {
            run(&Example { convention, ..example.clone() }.loss(Reduction::Mean)?, &logits, &targets)
        };
        let ours = of(Convention::Others(others))?;
        let theirs = of(Convention::All(others * classes / (classes - 1.)))?;
        close("loss", &ours.0, &theirs.0)?;
        close("gradient", &ours.1, &theirs.1)?;
    }

    /// Row by row and as a sum; the means of weighted classes have denominators of their own.
    fn labels_are_their_one_hot_probabilities(example) {
        let example = Example { ignores: false, soft: false, ..example };
        let (logits, labels) = (example.logits()?, example.labels()?);
        let classes = example.num_classes();
        let one_hot = smooth_targets(&labels, classes, &Smoothing::none())?;
        let last = one_hot.rank() - 1;
        let mut order: Vec<usize> = (0..last).collect();
        order.insert(example.class_dim, last);
        let one_hot = one_hot.permute(order)?;
        for reduction in [Reduction::None, Reduction::Sum, Reduction::Mean] {
            let loss = example.loss(reduction)?;
            let ours = run(&loss, &logits, &labels)?;
            let theirs = run(&loss, &logits, &one_hot)?;
            if !(example.weighted && reduction == Reduction::Mean) {
                close("loss", &ours.0, &theirs.0)?;
                close("gradient", &ours.1, &theirs.1)?;
                continue;
            }
            let weights = example.weights().and_then(|w| w.index_select(&labels.flatten_all()?, 0));
            let sum: f64 = numbers(&weights?)?.iter().sum();
            let scale = sum / example.num_rows() as f64;
            close("weighted mean", &(ours.0 * scale)?, &theirs.0)?;
        }
    }

    fn no_smoothing_is_the_cross_entropy_of_candle_nn(example) {
        let example = Example {
            convention: Convention::None, weighted: false, ignores: false, z_loss: 0., soft: false, ..example
        };
        let (logits, labels) = (example.logits()?, example.labels()?);
        let ours = run(&example.loss(Reduction::Mean)?, &logits, &labels)?;
        let var = Var::from_tensor(&logits)?;
        let theirs = example
            .by_row(&var)
            .and_then(|rows| candle_nn::loss::cross_entropy(&rows, &labels.flatten_all()?))?;
        close("loss", &ours.0, &theirs)?;
        let gradients = theirs.backward()?;
        close("gradient", &ours.1, gradients.get(&var).expect("a gradient"))?;
    }

    /// In f32, which is what they are given in.
    fn smooth_targets_sum_to_1_and_give_the_same_loss(example) {
        let example = Example { weighted: false, ignores: false, soft: false, ..example };
        let (logits, labels) = (example.logits()?, example.labels()?);
        let rows = example.by_row(&logits)?;
        let labels = labels.flatten_all()?;
        let smoothing = example.smoothing()?;
        let soft = smooth_targets(&labels, example.num_classes(), &smoothing)?;
        for sum in numbers(&soft.sum(1)?)? {
            prop_assert!((sum - 1.).abs() < 1e-5, "{sum}");
        }
        let of = |smoothing, targets: &Tensor| {
            LabelSmoothingLoss::new(smoothing).with_z_loss(example.z_loss)?.forward(&rows, targets)
        };
        let ours = of(smoothing, &labels)?;
        let theirs = of(Smoothing::none(), &soft)?;
        let (ours, theirs) = (numbers(&ours)?[0], numbers(&theirs)?[0]);
        prop_assert!((ours - theirs).abs() < 1e-6 * (1. + theirs), "{ours} and {theirs}");
    }

    fn the_sums_of_a_split_batch_add_up(example) {
        let loss = example.loss(Reduction::Sum)?.with_class_dim(1);
        let rows = example.by_row(&example.logits()?)?;
        let targets = match example.soft {
            true => example.targets().and_then(|targets| example.by_row(&targets)),
            false => example.targets().and_then(|targets| targets.flatten_all()),
        };
        let targets = targets?;
        let first = example.num_rows() / 2;
        let part = |start, len| -> Result<(Tensor, Tensor)> {
            run(&loss, &rows.narrow(0, start, len)?, &targets.narrow(0, start, len)?)
        };
        let whole = run(&loss, &rows, &targets)?;
        let (a, b) = (part(0, first), part(first, example.num_rows() - first));
        let (a, b) = (a?, b?);
        close("loss", &(a.0 + b.0)?, &whole.0)?;
        close("gradient", &Tensor::cat(&[a.1, b.1], 0)?, &whole.1)?;
    }

    /// Of any tile, hidden size, layout of the hidden states and the weight, and upstream gradient.
    fn hidden_states_give_what_their_logits_give(example) {
        let mut dims = example.dims.clone();
        let classes = dims.remove(example.class_dim);
        dims.push(classes);
        let class_dim = dims.len() - 1;
        let example = Example { dims, class_dim, ..example };
        let seed = example.seed;
        // The tile is as random as all else.
        let size = (seed % 7) as usize;
        let tile = TileSize {
            rows: 1 + (seed / 7 % 9) as usize,
            classes: 1 + (seed / 63) as usize % (2 * classes),
        };
        let (num_rows, scale) = (example.num_rows(), example.range / 10.);
        let hidden = random(&[size, num_rows], scale, seed + 10)?.t()?;
        let hidden = Var::from_tensor(&hidden.reshape([example.rows(), vec![size]].concat())?)?;
        let weight = Var::from_tensor(&random(&[size, classes], 1., seed + 11)?)?;
        let bias = Var::from_tensor(&random(&[classes], 1., seed + 12)?)?;
        let targets = example.targets()?;
        let has_bias = !seed.is_multiple_of(3);
        let reductions = [Reduction::None, Reduction::Sum, Reduction::Mean];
        let loss = example.loss(reductions[(seed % 3) as usize])?;
        let gradients_of = |loss: &Tensor| -> Result<[Option<Tensor>; 3]> {
            let upstream = random(loss.dims(), 1., seed + 13)?;
            let gradients = (loss * upstream)?.sum_all()?.backward()?;
            Ok([&hidden, &weight, &bias].map(|var| gradients.get(var).cloned()))
        };
        let transposed = weight.t()?;
        let tiled = testing::forward_linear_tiled(
            &loss,
            &hidden,
            &transposed,
            has_bias.then_some(&*bias),
            &targets,
            tile,
        )?;
        let logits = hidden.reshape((num_rows, size))?.matmul(&weight)?;
        let logits = match has_bias {
            true => logits.broadcast_add(&bias)?,
            false => logits,
        };
        let whole = loss.forward(&logits.reshape(example.dims.as_slice())?, &targets)?;
        close("loss", &tiled, &whole)?;
        if numbers(&whole)?.iter().all(|loss| loss.is_finite()) {
            for (ours, theirs) in gradients_of(&tiled)?.iter().zip(gradients_of(&whole)?) {
                match (ours, theirs) {
                    (Some(ours), Some(theirs)) => close("gradient", ours, &theirs)?,
                    (ours, theirs) => prop_assert!(ours.is_none() && theirs.is_none()),
                }
            }
        }
    }
}

/// That the examples are not all of one kind.
#[test]
fn examples_differ() {
    use proptest::strategy::ValueTree;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let strategy = example();
    let examples: Vec<Example> =
        (0..128).map(|_| strategy.new_tree(&mut runner).expect("an example").current()).collect();
    for class_dim in 0..3 {
        assert!(examples.iter().any(|example| example.class_dim == class_dim));
    }
    assert!(examples.iter().any(|example| example.num_classes() > 256));
    assert!(examples.iter().any(|example| example.num_classes() == 1));
    assert!(examples.iter().any(|example| example.soft && example.weighted));
    assert_eq!(examples[0].logits().expect("logits").dtype(), DType::F64);
}
