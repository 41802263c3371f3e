//! The options of an input, both as the library and as the formula take them. Invalid options must be errors, and are left out.

use crate::compare::{check_validity, element_count, to_f64s};
use crate::formula::{Formula, SmoothingKind};
use crate::input::{ClassVector, Convention, MAX_ELEMENTS, Options, Scalar};
use candle_core::{DType, Result, Tensor};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing};

/// The loss, its smoothing and its formula, or `None` if a tensor would be too large.
pub fn build(
    options: &Options,
    num_classes: usize,
) -> Result<Option<(LabelSmoothingLoss, Smoothing, Formula)>> {
    let num_classes = if num_classes > MAX_ELEMENTS { 3 } else { num_classes };
    let Some((smoothing, kind, epsilon)) = smoothing(options, num_classes)? else {
        return Ok(None);
    };
    let mean = if options.zero_if_empty { Reduction::MeanOrZero } else { Reduction::Mean };
    let reduction = [mean, Reduction::Sum, Reduction::None][usize::from(options.reduction) % 3];
    let mut loss = LabelSmoothingLoss::new(smoothing.clone()).with_reduction(reduction);
    let mut class_weights = None;
    if let Some(weights) = &options.class_weights {
        let Some((tensor, weights)) = class_vector(weights, num_classes, false)? else {
            return Ok(None);
        };
        let weighted = loss.clone().with_class_weights(&tensor);
        loss = check_validity(weighted, weights.is_some()).unwrap_or(loss);
        class_weights = weights;
    }
    let ignore_index = options.ignore_index.as_ref().map(|index| index.get());
    if let Some(index) = ignore_index {
        loss = loss.with_ignore_index(index);
    }
    match options.class_dim {
        None => {}
        Some(255) => loss = loss.with_class_dim(usize::MAX),
        Some(dim) => loss = loss.with_class_dim(usize::from(dim) % 6),
    }
    if let Some(bytes) = options.logits_budget {
        loss = loss.with_logits_budget(bytes.into());
    }
    let is_not_negative = |value: f64| value.is_finite() && value >= 0.;
    let is_positive = |value: f64| value.is_finite() && value > 0.;
    let (mut z_loss, mut scale, mut cap) = (None, None, None);
    // From 0 to 1, from 0 to 4 and from 0 to 16.
    let z_loss_given = (&options.z_loss, 1., &mut z_loss);
    let scale_given = (&options.scale, 4., &mut scale);
    let cap_given = (&options.cap, 16., &mut cap);
    loss = set(loss, LabelSmoothingLoss::with_z_loss, is_not_negative, z_loss_given);
    loss = set(loss, LabelSmoothingLoss::with_logit_scale, is_positive, scale_given);
    loss = set(loss, LabelSmoothingLoss::with_softcap, is_positive, cap_given);
    let formula = Formula {
        kind,
        epsilon,
        class_weights,
        ignore_index,
        z_loss: z_loss.unwrap_or(0.),
        reduction,
        row_weights: None,
        scale: scale.unwrap_or(1.),
        cap,
    };
    Ok(Some((loss, smoothing, formula)))
}

/// Sets an option to a given number times a factor, and writes the number if it is valid.
fn set(
    loss: LabelSmoothingLoss,
    with: fn(LabelSmoothingLoss, f64) -> candle_label_smoothing::Result<LabelSmoothingLoss>,
    is_valid: impl Fn(f64) -> bool,
    (given, factor, valid): (&Option<Scalar>, f64, &mut Option<f64>),
) -> LabelSmoothingLoss {
    let Some(given) = given else {
        return loss;
    };
    let value = given.get() * factor;
    *valid = is_valid(value).then_some(value);
    check_validity(with(loss.clone(), value), valid.is_some()).unwrap_or(loss)
}

/// The smoothing for the library and for the formula, and epsilon.
fn smoothing(
    options: &Options,
    num_classes: usize,
) -> Result<Option<(Smoothing, SmoothingKind, f64)>> {
    let (epsilon, smoothing, kind) = match (&options.unmasked, &options.convention) {
        (Some(epsilon), _) => {
            let epsilon = epsilon.get();
            (epsilon, Smoothing::over_unmasked(epsilon), Some(SmoothingKind::Unmasked))
        }
        (_, Convention::None) => (0., Ok(Smoothing::none()), Some(SmoothingKind::None)),
        (_, Convention::All(epsilon)) => {
            let epsilon = epsilon.get();
            (epsilon, Smoothing::over_all(epsilon), Some(SmoothingKind::All))
        }
        (_, Convention::Others(epsilon)) => {
            let epsilon = epsilon.get();
            (epsilon, Smoothing::over_others(epsilon), Some(SmoothingKind::Others))
        }
        (_, Convention::Toward(epsilon, prior)) => {
            let Some((tensor, prior)) = class_vector(prior, num_classes, true)? else {
                return Ok(None);
            };
            let epsilon = epsilon.get();
            let kind = prior.and_then(|mut prior| {
                let sum = prior.iter().fold(0., |sum, p| sum + p);
                prior.iter_mut().for_each(|p| *p /= sum);
                ((sum - 1.).abs() <= 1e-3).then_some(SmoothingKind::Toward(prior))
            });
            (epsilon, Smoothing::toward(epsilon, &tensor), kind)
        }
    };
    let kind = kind.filter(|_| (0. ..=1.).contains(&epsilon));
    let epsilon = if kind.is_some() { epsilon } else { 0. };
    let smoothing = check_validity(smoothing, kind.is_some()).unwrap_or(Smoothing::none());
    Ok(Some((smoothing, kind.unwrap_or(SmoothingKind::None), epsilon)))
}

/// A number for each class, as a tensor and as its elements if they are valid.
fn class_vector(
    vector: &ClassVector,
    num_classes: usize,
    is_prior: bool,
) -> Result<Option<(Tensor, Option<Vec<f64>>)>> {
    let Some(built) = vector.build(num_classes, is_prior)? else {
        return Ok(None);
    };
    let tensor = built.view;
    let is_vector = tensor.rank() == 1
        && !built.is_truncated
        && element_count(tensor.dims()) <= MAX_ELEMENTS
        && tensor.dtype().is_float()
        && tensor.dtype() != DType::F8E8M0;
    let values = if is_vector { Some(to_f64s(&tensor)?) } else { None };
    let are_valid = |values: &Vec<f64>| values.iter().all(|v| v.is_finite() && *v >= 0.);
    Ok(Some((tensor, values.filter(are_valid))))
}
