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
    /// Over the classes that are not masked. Some logits are masked.
    Unmasked(f64),
}

/// The weights of the rows. The last two have zeros.
#[derive(Clone, Copy, Debug, PartialEq)]
enum RowWeights {
    None,
    Mask,
    Numbers,
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
    row_weights: RowWeights,
    scale: Option<f64>,
    cap: Option<f64>,
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
            Convention::Unmasked(epsilon) => Smoothing::over_unmasked(epsilon)?,
        })
    }

    fn weights(&self) -> Result<Tensor> {
        random(&[self.num_classes()], 1., self.seed + 4)?.abs()
    }

    /// The weights of the rows, in the shape of the rows.
    fn row_weights(&self) -> Result<Option<Tensor>> {
        let random = random(&self.rows(), 1., self.seed + 5)?;
        let mask = random.gt(-0.4)?;
        Ok(match self.row_weights {
            RowWeights::None => None,
            RowWeights::Mask => Some(mask),
            RowWeights::Numbers => Some(((random + 1.)? * mask.to_dtype(DType::F64)?)?),
        })
    }

    /// The loss without weights for the rows.
    fn unweighted_loss(&self, reduction: Reduction) -> Result<LabelSmoothingLoss> {
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
        if let Some(scale) = self.scale {
            loss = loss.with_logit_scale(scale)?;
        }
        if let Some(cap) = self.cap {
            loss = loss.with_softcap(cap)?;
        }
        Ok(loss)
    }

    fn loss(&self, reduction: Reduction) -> Result<LabelSmoothingLoss> {
        let loss = self.unweighted_loss(reduction)?;
        match self.row_weights()? {
            Some(weights) => Ok(loss.weigh_rows(&weights)?),
            None => Ok(loss),
        }
    }

    /// The masked logits, of which none is the label's; `None` without masks.
    fn mask(&self) -> Result<Option<Tensor>> {
        if !matches!(self.convention, Convention::Unmasked(_)) {
            return Ok(None);
        }
        let mut shape = vec![1; self.dims.len()];
        shape[self.class_dim] = self.num_classes();
        let classes = (0..self.num_classes() as i64).collect();
        let classes = Tensor::from_vec::<_, i64>(classes, shape, &CPU)?;
        let is_other = classes.broadcast_ne(&self.labels()?.unsqueeze(self.class_dim)?)?;
        Ok(Some((random(&self.dims, 1., self.seed + 6)?.lt(0.)? * is_other)?))
    }

    /// The tensor with `value` at the masked logits.
    fn masked(&self, tensor: Tensor, value: f64) -> Result<Tensor> {
        match self.mask()? {
            Some(mask) => mask.where_cond(&Tensor::full(value, tensor.dims(), &CPU)?, &tensor),
            None => Ok(tensor),
        }
    }

    fn logits(&self) -> Result<Tensor> {
        self.masked(random(&self.dims, self.range, self.seed)?, f64::NEG_INFINITY)
    }

    fn labels(&self) -> Result<Tensor> {
        random_labels(&self.rows(), self.num_classes(), self.seed + 1)
    }

    /// The sum of masked probabilities is below 1.
    fn targets(&self) -> Result<Tensor> {
        match self.soft {
            true => {
                let dim = self.class_dim;
                self.masked(random_probabilities(&self.dims, dim, self.seed + 2)?, 0.)
            }
            false => self.labels(),
        }
    }

    /// The targets of [`by_row`](Self::by_row).
    fn targets_by_row(&self) -> Result<Tensor> {
        match self.soft {
            true => self.by_row(&self.targets()?),
            false => self.targets()?.flatten_all(),
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
        (0f64..=1.).prop_map(Convention::Unmasked),
    ];
    let dims = prop_oneof![
        prop::collection::vec(1usize..6, 1..5),
        prop::collection::vec(1usize..70, 2..3),
        prop::collection::vec(250usize..600, 1..2),
    ];
    let row_weights = prop_oneof![
        2 => Just(RowWeights::None),
        1 => Just(RowWeights::Mask),
        1 => Just(RowWeights::Numbers),
    ];
    let map = (prop::option::of(0.1f64..3.), prop::option::of(1f64..40.));
    let index = any::<prop::sample::Index>();
    let numbers = (0.1f64..30., 0u64..1 << 40);
    (dims, index, convention, any::<[bool; 4]>(), numbers, row_weights, map).prop_map(
        |(dims, class_dim, convention, flags, (range, seed), row_weights, (scale, cap))| {
            let class_dim = class_dim.index(dims.len());
            let [weighted, ignores, has_z, soft] = flags;
            let z_loss = if has_z { 0.01 } else { 0. };
            Example {
                dims,
                class_dim,
                convention,
                weighted,
                ignores,
                z_loss,
                row_weights,
                scale,
                cap,
                soft,
                range,
                seed,
            }
        },
    )
}

const REDUCTIONS: [Reduction; 4] =
    [Reduction::None, Reduction::Sum, Reduction::Mean, Reduction::MeanOrZero];

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
        for reduction in REDUCTIONS {
            let loss = example.loss(reduction)?;
            let (logits, targets) = (example.logits()?, example.targets()?);
            let (actual, gradient) = run(&loss, &logits, &targets)?;
            let var = Var::from_tensor(&logits)?;
            let expected = reference::forward(&loss, &var, &targets)?;
            close("loss", &actual, &expected)?;
            // If no row counts, the mean is NaN and the gradient is 0.
            if numbers(&actual)?.iter().all(|loss| loss.is_finite()) {
                let gradients = expected.sum_all().and_then(|sum| sum.backward())?;
                close("gradient", &gradient, gradients.get(&var).expect("a gradient"))?;
            }
        }
    }

    /// Σ_k ∂loss/∂x_k is 2·z·lse times the row's weight, and 0 without z-loss. A scale and a softcap give each class another
    /// factor.
    fn gradient_of_a_row_sums_to_the_z_loss_term(example) {
        let example = Example { scale: None, cap: None, ..example };
        let loss = example.loss(Reduction::None)?;
        let (logits, targets) = (example.logits()?, example.targets()?);
        let (_, gradient) = run(&loss, &logits, &targets)?;
        let sums = example.by_row(&gradient).and_then(|rows| rows.sum(1))?;
        let lse = example.by_row(&logits).and_then(|rows| rows.log_sum_exp(1))?;
        let mut weights = match example.row_weights()? {
            Some(weights) => numbers(&weights)?,
            None => vec![1.; example.num_rows()],
        };
        if example.ignores && !example.soft {
            for (weight, label) in weights.iter_mut().zip(numbers(&targets)?) {
                *weight *= if label == 0. { 0. } else { 1. };
            }
        }
        for ((sum, lse), weight) in numbers(&sums)?.iter().zip(numbers(&lse)?).zip(weights) {
            let expected = 2. * example.z_loss * lse * weight;
            prop_assert!((sum - expected).abs() < 1e-12 * (1. + lse.abs()), "{sum}, not {expected}");
        }
    }

    /// A softcap does not commute with the addition.
    fn adding_a_constant_to_all_logits_changes_nothing_without_z_loss(example) {
        let example = Example { z_loss: 0., cap: None, ..example };
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
        // The logits are not masked.
        let example = Example { convention: Convention::None, ..example };
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
            let row_weights = match example.row_weights()? {
                Some(weights) => numbers(&weights)?,
                None => vec![1.; example.num_rows()],
            };
            let of_labels = numbers(&weights?)?;
            let sum: f64 = of_labels.iter().zip(&row_weights).map(|(w, v)| w * v).sum();
            let scale = sum / row_weights.iter().sum::<f64>();
            close("weighted mean", &(actual.0 * scale)?, &expected.0)?;
        }
    }

    fn without_smoothing_matches_candle_nn_cross_entropy(example) {
        let example = Example {
            convention: Convention::None,
            weighted: false,
            ignores: false,
            z_loss: 0.,
            row_weights: RowWeights::None,
            scale: None,
            cap: None,
            soft: false,
            ..example
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

    /// The tolerance is that of f32, the dtype of the smoothed targets. `smooth_targets` has no logits, so it knows no masks.
    fn smooth_targets_sum_to_1_and_give_the_same_loss(example) {
        let convention = match example.convention {
            Convention::Unmasked(epsilon) => Convention::All(epsilon),
            other => other,
        };
        let example =
            Example { convention, weighted: false, ignores: false, soft: false, ..example };
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
        let loss = example.unweighted_loss(Reduction::Sum)?.with_class_dim(1);
        let rows = example.by_row(&example.logits()?)?;
        let targets = example.targets_by_row()?;
        let weights = example.row_weights()?;
        let first = example.num_rows() / 2;
        let part = |start, len| -> Result<(Tensor, Tensor)> {
            let loss = match &weights {
                Some(weights) => {
                    loss.weigh_rows(&weights.flatten_all()?.narrow(0, start, len)?)?
                }
                None => loss.clone(),
            };
            run(&loss, &rows.narrow(0, start, len)?, &targets.narrow(0, start, len)?)
        };
        let whole = part(0, example.num_rows())?;
        let (a, b) = (part(0, first), part(first, example.num_rows() - first));
        let (a, b) = (a?, b?);
        close("loss", &(a.0 + b.0)?, &whole.0)?;
        close("gradient", &Tensor::cat(&[a.1, b.1], 0)?, &whole.1)?;
    }

    /// The gradient of the other rows is 0.
    fn a_mask_has_the_loss_of_the_kept_rows(example) {
        let example = Example { row_weights: RowWeights::Mask, ..example };
        let mask = example.row_weights()?.expect("a mask").flatten_all()?;
        let kept: Vec<u32> = (0..).zip(numbers(&mask)?).filter(|(_, v)| *v == 1.).map(|v| v.0).collect();
        let kept = Tensor::from_vec(kept.clone(), kept.len(), &CPU)?;
        let rows = example.by_row(&example.logits()?)?;
        let targets = example.targets_by_row()?;
        for reduction in [Reduction::Sum, Reduction::Mean, Reduction::MeanOrZero] {
            let loss = example.unweighted_loss(reduction)?.with_class_dim(1);
            let few = (rows.index_select(&kept, 0)?, targets.index_select(&kept, 0)?);
            let expected = run(&loss, &few.0, &few.1)?;
            let actual = run(&loss.weigh_rows(&mask)?, &rows, &targets)?;
            close("loss", &actual.0, &expected.0)?;
            close("gradient", &actual.1.index_select(&kept, 0)?, &expected.1)?;
            let rest = actual.1.broadcast_mul(&mask.eq(0u8)?.to_dtype(DType::F64)?.unsqueeze(1)?)?;
            prop_assert!(numbers(&rest)?.iter().all(|g| *g == 0.));
        }
    }

    /// The metrics have the numbers of other losses: `nll` is the loss without smoothing, and with a z-loss of 1 it has lse²
    /// more.
    fn metrics_agree_with_forward(example) {
        let example = Example { soft: false, ..example };
        let (logits, labels) = (example.logits()?, example.targets()?);
        let loss = example.loss(Reduction::Mean)?;
        let (actual, metrics) = loss.forward_with_metrics(&logits, &labels)?;
        let (actual, expected) = (numbers(&actual)?, numbers(&loss.forward(&logits, &labels)?)?);
        prop_assert!(actual == expected || actual[0].is_nan() && expected[0].is_nan());

        let counted = &metrics.counted;
        let zeros = counted.zeros_like()?;
        let of_counted =
            |tensor: &Tensor| counted.to_dtype(DType::U8)?.where_cond(tensor, &zeros);
        // The logits keep their masks.
        let plain = LabelSmoothingLoss::new(Smoothing::none())
            .with_class_dim(example.class_dim)
            .with_reduction(Reduction::None)
            .with_logit_scale(example.scale.unwrap_or(1.))?;
        let plain = match example.cap {
            Some(cap) => plain.with_softcap(cap)?,
            None => plain,
        };
        let nll = plain.forward(&logits, &labels)?;
        close("nll", &metrics.nll, &of_counted(&nll)?)?;
        let squared = (plain.with_z_loss(1.)?.forward(&logits, &labels)? - nll)?;
        let squares = numbers(&of_counted(&squared)?)?;
        for (lse, squared) in numbers(&metrics.lse)?.iter().zip(squares) {
            prop_assert!((lse * lse - squared).abs() <= 1e-11 * (1. + squared), "{lse}");
        }

        // A row counts if it is neither ignored nor of weight 0.
        let mut rows = numbers(&labels.to_dtype(DType::F64)?)?;
        rows.iter_mut().for_each(|y| *y = if example.ignores && *y == 0. { 0. } else { 1. });
        if let Some(weights) = example.row_weights()? {
            let weights = numbers(&weights)?;
            rows.iter_mut().zip(weights).for_each(|(row, v)| *row *= if v == 0. { 0. } else { 1. });
        }
        prop_assert_eq!(numbers(counted)?, rows);
        let correct = numbers(&metrics.correct)?;
        let hits = numbers(&metrics.prediction.eq(&labels.to_dtype(DType::U32)?)?)?;
        for ((correct, hit), counted) in correct.iter().zip(hits).zip(numbers(counted)?) {
            prop_assert_eq!(*correct, hit * counted);
        }
        // The entropy is at most log K, and the confidence at least 1/K.
        let classes = example.num_classes() as f64;
        for (entropy, confidence) in
            numbers(&metrics.entropy)?.iter().zip(numbers(&metrics.confidence)?)
        {
            prop_assert!((-1e-12..=classes.ln() + 1e-12).contains(entropy), "{entropy}");
            prop_assert!(confidence == 0. || confidence > (1. - 1e-12) / classes, "{confidence}");
        }
    }

    /// For any tile, budget, hidden size, layout of hidden states and weight, and grad_output.
    fn forward_linear_matches_forward(example) {
        let mut dims = example.dims.clone();
        let classes = dims.remove(example.class_dim);
        dims.push(classes);
        let class_dim = dims.len() - 1;
        let example = Example { dims, class_dim, ..example };
        let seed = example.seed;
        // The seed determines hidden size, tile and budget.
        let size = (seed % 7) as usize;
        let tile = TileSize {
            rows: 1 + (seed / 7 % 9) as usize,
            classes: 1 + (seed / 63) as usize % (2 * classes),
        };
        let (num_rows, scale) = (example.num_rows(), example.range / 10.);
        let logits_bytes = num_rows * classes * size_of::<f64>();
        let budget = [0, usize::MAX, logits_bytes / 2, logits_bytes][(seed / 5 % 4) as usize];
        let hidden = random(&[size, num_rows], scale, seed + 10)?.t()?;
        let hidden = Var::from_tensor(&hidden.reshape([example.rows(), vec![size]].concat())?)?;
        let weight = Var::from_tensor(&random(&[size, classes], 1., seed + 11)?)?;
        let bias = Var::from_tensor(&random(&[classes], 1., seed + 12)?)?;
        let targets = example.targets()?;
        let has_bias = !seed.is_multiple_of(3);
        let loss = example.loss(REDUCTIONS[(seed % 4) as usize])?;
        let gradients_of = |loss: &Tensor| -> Result<[Option<Tensor>; 3]> {
            let grad_output = random(loss.dims(), 1., seed + 13)?;
            let gradients = (loss * grad_output)?.sum_all()?.backward()?;
            Ok([&hidden, &weight, &bias].map(|var| gradients.get(var).cloned()))
        };
        let transposed = weight.t()?;
        let tiled = testing::forward_linear_tiled_within_budget(
            &loss,
            &hidden,
            &transposed,
            has_bias.then_some(&*bias),
            &targets,
            tile,
            budget,
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
    let masked = |example: &&Example| matches!(example.convention, Convention::Unmasked(_));
    assert!(examples.iter().filter(masked).any(|example| example.cap.is_some()));
    for row_weights in [RowWeights::None, RowWeights::Mask, RowWeights::Numbers] {
        assert!(examples.iter().any(|example| example.row_weights == row_weights));
    }
    assert_eq!(examples[0].logits().expect("logits").dtype(), DType::F64);
}
