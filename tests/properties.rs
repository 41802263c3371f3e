//! Properties of cross-entropy, tested in f64 on random shapes, class dimensions and options.

mod common;

use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::testing::{self, TileSize};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing, reference, smooth_targets};
use common::{CPU, random, random_labels, random_probabilities, values};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

/// Smoothing by its parameters, which a failing test prints.
#[derive(Clone, Copy, Debug)]
enum Convention {
    None,
    All(f64),
    Others(f64),
    Toward(f64),
}

/// Parameters of a random loss and its inputs.
#[derive(Clone, Debug)]
struct Example {
    dims: Vec<usize>,
    class_dim: usize,
    convention: Convention,
    weighted: bool,
    ignores: bool,
    z_loss: f64,
    /// Whether the targets are probabilities.
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

    /// Moves the classes last and flattens the rows: (rows, classes).
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

/// The loss, and the logits' gradient of its sum.
fn run(loss: &LabelSmoothingLoss, logits: &Tensor, targets: &Tensor) -> Result<(Tensor, Tensor)> {
    let logits = Var::from_tensor(logits)?;
    let result = loss.forward(&logits, targets)?;
    let gradients = result.sum_all()?.backward()?;
    Ok((result, gradients.get(&logits).expect("no gradient").clone()))
}

fn close(what: &str, actual: &Tensor, expected: &Tensor) -> std::result::Result<(), TestCaseError> {
    let (actual, expected) = (numbers(actual)?, numbers(expected)?);
    prop_assert_eq!(actual.len(), expected.len());
    for (actual, expected) in actual.iter().zip(expected) {
        let close = (actual - expected).abs() <= 1e-11 * expected.abs().max(1.);
        prop_assert!(
            close || actual.is_nan() && expected.is_nan(),
            "{what}: {actual}, expected {expected}"
        );
    }
    Ok(())
}

fn numbers(tensor: &Tensor) -> std::result::Result<Vec<f64>, TestCaseError> {
    Ok(values(tensor)?)
}

/// Defines property tests. A candle error fails the test.
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
    fn forward_and_backward_match_the_reference(example) {
        for reduction in [Reduction::None, Reduction::Sum, Reduction::Mean] {
            let loss = example.loss(reduction)?;
            let (logits, targets) = (example.logits()?, example.targets()?);
            let (actual, gradient) = run(&loss, &logits, &targets)?;
            let var = Var::from_tensor(&logits)?;
            let expected = reference::forward(&loss, &var, &targets)?;
            close("loss", &actual, &expected)?;
            // If all rows are ignored, the mean is NaN and the gradient is 0.
            if numbers(&actual)?.iter().all(|loss| loss.is_finite()) {
                let gradients = expected.sum_all().and_then(|sum| sum.backward())?;
                close("gradient", &gradient, gradients.get(&var).expect("a gradient"))?;
            }
        }
    }

    /// Σ_k ∂loss/∂x_k is 2·z·lse, and 0 without z-loss.
    fn gradient_of_a_row_sums_to_the_z_loss_term(example) {
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

    fn adding_a_constant_to_all_logits_changes_nothing_without_z_loss(example) {
        let example = Example { z_loss: 0., ..example };
        let loss = example.loss(Reduction::None)?;
        let (logits, targets) = (example.logits()?, example.targets()?);
        // The addition of a power of two hardly rounds.
        let shifted = (&logits + 1024.)?;
        let (actual, expected) = (run(&loss, &shifted, &targets), run(&loss, &logits, &targets));
        let (actual, expected) = (actual?, expected?);
        close("loss", &actual.0, &expected.0)?;
        close("gradient", &actual.1, &expected.1)?;
    }

    /// The targets are probabilities. Class weights and priors would have to be permuted too, so
    /// they are left out.
    fn permuting_the_classes_permutes_the_gradient(example) {
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
        let expected = run(&loss, &logits, &targets)?;
        let (logits, targets) = (permuted(&logits)?, permuted(&targets)?);
        let actual = run(&loss, &logits, &targets)?;
        close("loss", &actual.0, &expected.0)?;
        close("gradient", &actual.1, &permuted(&expected.1)?)?;
    }

    fn sum_reduction_is_the_sum_of_the_row_losses(example) {
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
        let actual = of(Convention::Others(others))?;
        let expected = of(Convention::All(others * classes / (classes - 1.)))?;
        close("loss", &actual.0, &expected.0)?;
        close("gradient", &actual.1, &expected.1)?;
    }

    /// For reduction none and sum. A mean with class weights has another denominator for labels
    /// than for probabilities.
    fn labels_match_their_one_hot_probabilities(example) {
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
            let actual = run(&loss, &logits, &labels)?;
            let expected = run(&loss, &logits, &one_hot)?;
            if !(example.weighted && reduction == Reduction::Mean) {
                close("loss", &actual.0, &expected.0)?;
                close("gradient", &actual.1, &expected.1)?;
                continue;
            }
            let weights = example.weights().and_then(|w| w.index_select(&labels.flatten_all()?, 0));
            let sum: f64 = numbers(&weights?)?.iter().sum();
            let scale = sum / example.num_rows() as f64;
            close("weighted mean", &(actual.0 * scale)?, &expected.0)?;
        }
    }

    fn without_smoothing_matches_candle_nn_cross_entropy(example) {
        let example = Example {
            convention: Convention::None, weighted: false, ignores: false, z_loss: 0., soft: false, ..example
        };
        let (logits, labels) = (example.logits()?, example.labels()?);
        let actual = run(&example.loss(Reduction::Mean)?, &logits, &labels)?;
        let var = Var::from_tensor(&logits)?;
        let expected = example
            .by_row(&var)
            .and_then(|rows| candle_nn::loss::cross_entropy(&rows, &labels.flatten_all()?))?;
        close("loss", &actual.0, &expected)?;
        let gradients = expected.backward()?;
        close("gradient", &actual.1, gradients.get(&var).expect("a gradient"))?;
    }

    /// The tolerance is that of f32, the dtype of the smoothed targets.
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
        let actual = of(smoothing, &labels)?;
        let expected = of(Smoothing::none(), &soft)?;
        let (actual, expected) = (numbers(&actual)?[0], numbers(&expected)?[0]);
        prop_assert!((actual - expected).abs() < 1e-6 * (1. + expected), "{actual}, expected {expected}");
    }

    fn sums_over_a_split_batch_add_up(example) {
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

    /// For any tile, hidden size, layout of hidden states and weight, and grad_output.
    fn forward_linear_matches_forward(example) {
        let mut dims = example.dims.clone();
        let classes = dims.remove(example.class_dim);
        dims.push(classes);
        let class_dim = dims.len() - 1;
        let example = Example { dims, class_dim, ..example };
        let seed = example.seed;
        // The seed determines hidden size and tile.
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
            let grad_output = random(loss.dims(), 1., seed + 13)?;
            let gradients = (loss * grad_output)?.sum_all()?.backward()?;
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
            for (actual, expected) in gradients_of(&tiled)?.iter().zip(gradients_of(&whole)?) {
                match (actual, expected) {
                    (Some(actual), Some(expected)) => close("gradient", actual, &expected)?,
                    (actual, expected) => prop_assert!(actual.is_none() && expected.is_none()),
                }
            }
        }
    }
}

/// The generated examples cover several class dimensions, class counts and options.
#[test]
fn strategy_covers_shapes_and_options() {
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
