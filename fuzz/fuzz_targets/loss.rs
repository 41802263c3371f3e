//! Calls every public function with arbitrary tensors and options.
//!
//! - An invalid call must return an error, a valid one must not.
//! - The results of a valid call must agree with the formula, up to rounding.
//! - Views must give the same bits as contiguous copies of them.
//! - No call may panic or hang. A tensor that does not fit into memory must be an error.
//!
//! Some inputs avoid limits of candle itself: its conversions and sums panic on empty views that begin beyond the end
//! of their storage, and abort on views that are larger than memory.
//!
//! cargo-fuzz needs unstable compiler options, which `RUSTC_BOOTSTRAP=1` enables in a stable compiler. The following
//! runs each stored seed once, then searches for new inputs for an hour:
//!
//! ```sh
//! RUSTC_BOOTSTRAP=1 cargo fuzz run loss fuzz/seeds/loss -- -runs=0
//! mkdir -p fuzz/corpus/loss
//! RUSTC_BOOTSTRAP=1 cargo fuzz run loss fuzz/corpus/loss fuzz/seeds/loss -- -max_len=400 -timeout=10 -max_total_time=3600
//! ```

#![no_main]

mod formula;
mod input;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_label_smoothing::testing::{self, TileSize};
use candle_label_smoothing::{
    Error, LabelSmoothingLoss, Metrics, Reduction, Shard, Smoothing, check_targets, smooth_targets,
};
use formula::{
    Approx, Formula, RowMetrics, Shape, SmoothingKind, Targets, compute_dtype, unit_roundoff,
};
use input::{BuiltTensor, Call, ClassVector, Convention, Input, MAX_ELEMENTS, TensorSpec};
use libfuzzer_sys::{Corpus, fuzz_target};
use std::ffi::{CStr, c_char};

/// Makes larger allocations fail. The library must return an error for them.
#[unsafe(no_mangle)]
extern "C" fn __asan_default_options() -> *const c_char {
    const OPTIONS: &CStr = c"allocator_may_return_null=1:max_allocation_size_mb=64";
    OPTIONS.as_ptr()
}

/// The largest number of classes that labels can have: the kernels index classes with 32 bits.
const MAX_CLASSES: usize = u32::MAX as usize;

/// This many rows need more memory than the allocation limit.
const TOO_MANY_ROWS: usize = 1 << 25;

fuzz_target!(|input: Input| -> Corpus {
    match run(&input) {
        Ok(Some(())) => Corpus::Keep,
        // Skipped, since it would take too long.
        Ok(None) => Corpus::Reject,
        Err(error) => panic!("candle: {error}"),
    }
});

fn run(input: &Input) -> Result<Option<()>> {
    let mut dims = input.dims.get();
    if dims.is_empty() && matches!(input.call, Call::Linear { .. }) {
        dims.push(3);
    }
    let class_dim = match input.options.class_dim {
        None => dims.len().wrapping_sub(1),
        Some(255) => usize::MAX,
        Some(dim) => usize::from(dim) % 6,
    };
    let num_classes = dims.get(class_dim).copied().unwrap_or(3);
    let Some((loss, smoothing, mut formula)) = options(input, num_classes)? else {
        return Ok(None);
    };
    let mut rows = dims.clone();
    if class_dim < rows.len() {
        rows.remove(class_dim);
    }
    let row_weights = input.more.as_ref().and_then(|more| more.row_weights.as_ref());
    let row_weights = match row_weights.map(|weights| weights.build(&rows)).transpose()? {
        Some(None) => return Ok(None),
        weights => weights.flatten(),
    };
    let mut are_row_weights_valid = true;
    if let Some(weights) = &row_weights {
        let (view, dtype) = (&weights.view, weights.view.dtype());
        let is_valid = dtype == DType::U8 || dtype.is_float() && dtype != DType::F8E8M0;
        are_row_weights_valid = is_valid;
        if is_valid && element_count(&rows) <= MAX_ELEMENTS {
            let values = if weights.is_truncated { vec![] } else { to_f64s(view)? };
            are_row_weights_valid = !weights.is_truncated
                && view.dims() == rows
                && values.iter().all(|value| value.is_finite() && *value >= 0.);
            formula.row_weights = are_row_weights_valid.then_some(values);
        }
    }
    let dtype = input.targets.dtype(9);
    let mut targets_dims = if dtype.is_float() { &dims } else { &rows }.clone();
    match input.targets_mistake.get() {
        None => {}
        Some(0..3) => targets_dims.push(1),
        Some(3..6) => drop(targets_dims.pop()),
        Some(_) => targets_dims = if dtype.is_float() { &rows } else { &dims }.clone(),
    }
    let targets = match dtype.is_float() {
        true => input.targets.floats(&targets_dims, dtype)?,
        false => input.targets.labels(&targets_dims, dtype, num_classes)?,
    };
    let Some(targets) = targets else {
        return Ok(None);
    };
    let case = Case {
        input,
        loss,
        smoothing,
        formula,
        dims,
        class_dim,
        row_weights: row_weights.map(|weights| weights.view),
        are_row_weights_valid,
        targets: targets.view,
        are_targets_truncated: targets.is_truncated,
    };
    match &input.call {
        Call::Forward { logits } => case.forward(logits),
        Call::Linear { .. } => case.linear(),
        Call::SmoothTargets { num_classes: len } => {
            case.smooth_targets(len.map_or(num_classes, |len| len.get()))
        }
        Call::CheckTargets { num_classes: len } => {
            case.check_targets(len.map_or(num_classes, |len| len.get()))
        }
    }
}

/// Asserts that the result is an error exactly if the call is invalid, and returns the value.
#[track_caller]
fn check_validity<T>(result: std::result::Result<T, Error>, is_valid: bool) -> Option<T> {
    match result {
        Ok(value) => {
            assert!(is_valid, "expected an error");
            Some(value)
        }
        Err(error) => {
            let message = error.to_string();
            assert!(!is_valid && !matches!(error, Error::Candle(_)), "{message}");
            None
        }
    }
}

/// The options, both as the library and as the formula take them. Invalid options are checked to be errors and left out.
fn options(
    Input { options, more, .. }: &Input,
    num_classes: usize,
) -> Result<Option<(LabelSmoothingLoss, Smoothing, Formula)>> {
    let num_classes = if num_classes > MAX_ELEMENTS { 3 } else { num_classes };
    // The tensor, and its elements if they are valid.
    let build = |vector: &ClassVector, is_prior| -> Result<Option<_>> {
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
    };
    let is_valid_epsilon = |epsilon: f64| (0. ..=1.).contains(&epsilon);
    let more = more.as_ref();
    let unmasked = more.and_then(|more| more.unmasked.as_ref());
    let (epsilon, smoothing, kind) = match (unmasked, &options.convention) {
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
            let Some((tensor, prior)) = build(prior, true)? else {
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
    let kind = kind.filter(|_| is_valid_epsilon(epsilon));
    let smoothing = check_validity(smoothing, kind.is_some()).unwrap_or(Smoothing::none());
    let mean = match more {
        Some(more) if more.zero_if_empty => Reduction::MeanOrZero,
        _ => Reduction::Mean,
    };
    let reduction = [mean, Reduction::Sum, Reduction::None][usize::from(options.reduction) % 3];
    let mut loss = LabelSmoothingLoss::new(smoothing.clone()).with_reduction(reduction);
    let mut formula = Formula {
        epsilon: if kind.is_some() { epsilon } else { 0. },
        kind: kind.unwrap_or(SmoothingKind::None),
        class_weights: None,
        ignore_index: options.ignore_index.as_ref().map(|index| index.get()),
        z_loss: 0.,
        reduction,
        row_weights: None,
        scale: 1.,
        cap: None,
    };
    if let Some(weights) = &options.class_weights {
        let Some((tensor, weights)) = build(weights, false)? else {
            return Ok(None);
        };
        let weighted = loss.clone().with_class_weights(&tensor);
        loss = check_validity(weighted, weights.is_some()).unwrap_or(loss);
        formula.class_weights = weights;
    }
    if let Some(index) = formula.ignore_index {
        loss = loss.with_ignore_index(index);
    }
    match options.class_dim {
        None => {}
        Some(255) => loss = loss.with_class_dim(usize::MAX),
        Some(dim) => loss = loss.with_class_dim(usize::from(dim) % 6),
    }
    if let Some(z_loss) = &options.z_loss {
        let z_loss = z_loss.get();
        let is_valid = z_loss.is_finite() && z_loss >= 0.;
        loss = check_validity(loss.clone().with_z_loss(z_loss), is_valid).unwrap_or(loss);
        formula.z_loss = if is_valid { z_loss } else { 0. };
    }
    let is_positive = |value: f64| value.is_finite() && value > 0.;
    if let Some(scale) = more.and_then(|more| more.scale.as_ref()) {
        // From 0 to 4.
        let scale = scale.get() * 4.;
        let scaled = loss.clone().with_logit_scale(scale);
        loss = check_validity(scaled, is_positive(scale)).unwrap_or(loss);
        formula.scale = if is_positive(scale) { scale } else { 1. };
    }
    if let Some(cap) = more.and_then(|more| more.cap.as_ref()) {
        // From 0 to 16.
        let cap = cap.get() * 16.;
        let capped = loss.clone().with_softcap(cap);
        loss = check_validity(capped, is_positive(cap)).unwrap_or(loss);
        formula.cap = is_positive(cap).then_some(cap);
    }
    Ok(Some((loss, smoothing, formula)))
}

/// The number of elements of a shape, which saturates.
fn element_count(dims: &[usize]) -> usize {
    if dims.contains(&0) { 0 } else { nonzero_product(dims) }
}

/// The product of the dimensions that are not 0.
fn nonzero_product(dims: &[usize]) -> usize {
    let lens = dims.iter().filter(|len| **len != 0);
    lens.fold(1, |product, &len| product.saturating_mul(len))
}

/// Whether f64 elements of this shape would exceed the address space. The library refuses such a shape in any dtype.
fn exceeds_address_space(dims: &[usize]) -> bool {
    nonzero_product(dims) > isize::MAX as usize / 8
}

fn contiguous_copy(view: &Tensor) -> Result<Tensor> {
    match view.dims().contains(&0) {
        true => Tensor::zeros(view.dims(), view.dtype(), &Device::Cpu),
        false => view.detach().force_contiguous(),
    }
}

fn to_f64s(tensor: &Tensor) -> Result<Vec<f64>> {
    let tensor = contiguous_copy(tensor)?.flatten_all()?;
    match tensor.dtype() {
        // The direct conversion from F8E4M3 to F64 never returns in candle 0.11.1.
        DType::F8E4M3 => tensor.to_dtype(DType::F32)?.to_dtype(DType::F64)?.to_vec1(),
        _ => tensor.to_dtype(DType::F64)?.to_vec1(),
    }
}

#[track_caller]
fn assert_same_bits(actual: &Tensor, expected: &Tensor) -> Result<()> {
    assert_eq!((actual.dims(), actual.dtype()), (expected.dims(), expected.dtype()));
    for (actual, expected) in to_f64s(actual)?.iter().zip(to_f64s(expected)?) {
        let is_same =
            actual.to_bits() == expected.to_bits() || actual.is_nan() && expected.is_nan();
        assert!(is_same, "{actual}, expected {expected}");
    }
    Ok(())
}

#[track_caller]
fn assert_close(name: &str, actual: &Tensor, expected: &[Approx]) -> Result<()> {
    let (dtype, actual) = (actual.dtype(), to_f64s(actual)?);
    assert_eq!(actual.len(), expected.len(), "{name}");
    for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let expected = expected.rounded_to(dtype);
        assert!(expected.accepts(*actual), "{name} {i}: {actual}, expected {expected:?}");
    }
    Ok(())
}

struct Case<'a> {
    input: &'a Input<'a>,
    loss: LabelSmoothingLoss,
    smoothing: Smoothing,
    formula: Formula,
    /// The shape of the logits.
    dims: Vec<usize>,
    class_dim: usize,
    row_weights: Option<Tensor>,
    are_row_weights_valid: bool,
    targets: Tensor,
    are_targets_truncated: bool,
}

impl Case<'_> {
    fn num_classes(&self) -> usize {
        self.dims[self.class_dim]
    }

    /// The elements of the targets, or `None` if the targets are invalid.
    fn read_targets(
        &self,
        num_classes: usize,
        ignore_index: Option<i64>,
        weighs: impl Fn(usize) -> f64,
    ) -> Result<Option<Targets>> {
        let dtype = self.targets.dtype();
        if dtype == DType::F8E8M0 || self.are_targets_truncated {
            return Ok(None);
        }
        if dtype.is_float() {
            return Ok(Some(Targets::Probabilities(to_f64s(&self.targets)?)));
        }
        let labels: Vec<i64> =
            contiguous_copy(&self.targets)?.to_dtype(DType::I64)?.flatten_all()?.to_vec1()?;
        let is_valid = |(row, label): (usize, &i64)| {
            usize::try_from(*label).is_ok_and(|label| label < num_classes)
                || Some(*label) == ignore_index
                || weighs(row) == 0.
        };
        Ok(labels.iter().enumerate().all(is_valid).then_some(Targets::Labels(labels)))
    }

    /// Whether the smoothing can be applied to `num_classes` classes.
    fn smoothing_fits(&self, num_classes: usize) -> bool {
        match &self.formula.kind {
            SmoothingKind::None | SmoothingKind::All | SmoothingKind::Unmasked => num_classes > 0,
            SmoothingKind::Others => num_classes > 1,
            SmoothingKind::Toward(prior) => num_classes > 0 && prior.len() == num_classes,
        }
    }

    /// The elements of the targets, or `None` if a call with logits of this dtype is invalid.
    fn valid_targets(&self, dtype: DType) -> Result<Option<Targets>> {
        let Self { formula, dims, class_dim, .. } = self;
        let is_logits_dtype = matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64);
        if !is_logits_dtype || *class_dim >= dims.len() || exceeds_address_space(dims) {
            return Ok(None);
        }
        let num_classes = self.num_classes();
        let num_weights = formula.class_weights.as_ref().map_or(num_classes, Vec::len);
        // The library refuses a class weight w if 2^24·w would overflow or 2^−24·w would be subnormal.
        let headroom = 2f64.powi(24);
        let weight_range = match dtype {
            DType::F64 => f64::MIN_POSITIVE * headroom..=f64::MAX / headroom,
            _ => f64::from(f32::MIN_POSITIVE) * headroom..=f64::from(f32::MAX) / headroom,
        };
        let is_in_range = |weight: &f64| *weight == 0. || weight_range.contains(weight);
        if !formula.class_weights.iter().flatten().all(is_in_range) {
            return Ok(None);
        }
        let mut rows = dims.clone();
        rows.remove(*class_dim);
        let targets_fit = match self.targets.dtype().is_float() {
            true => self.targets.dims() == dims && formula.ignore_index.is_none(),
            false => self.targets.dims() == rows && num_classes <= MAX_CLASSES,
        };
        if !self.are_row_weights_valid {
            return Ok(None);
        }
        if !(targets_fit && num_weights == num_classes && self.smoothing_fits(num_classes)) {
            return Ok(None);
        }
        self.read_targets(num_classes, formula.ignore_index, |row| formula.row_weight(row))
    }

    fn forward(&self, logits: &TensorSpec) -> Result<Option<()>> {
        let Self { dims, class_dim, .. } = self;
        let classes = dims.get(*class_dim).copied().unwrap_or(1);
        let rows = element_count(dims) / classes.max(1);
        let is_small = element_count(dims) <= MAX_ELEMENTS;
        // From 2^45 classes on, the states of the blocks of a single row exceed the allocation limit.
        if !is_small && !exceeds_address_space(dims) && rows < TOO_MANY_ROWS && classes < 1 << 45 {
            return Ok(None);
        }
        let dtype = logits.dtype(4);
        let Some(logits) = logits.floats(dims, dtype)? else {
            return Ok(None);
        };
        let call = |loss: &LabelSmoothingLoss, inputs: &[&Tensor], targets: &Tensor| {
            loss.forward(inputs[0], targets)
        };
        if !is_small {
            drop(call(&self.weigh(self.row_weights.as_ref())?, &[&logits.view], &self.targets));
            return Ok(Some(()));
        }
        let targets = if logits.is_truncated { None } else { self.valid_targets(dtype)? };
        let Some((loss, gradients)) = self.run_with_copies(&[&logits], call, targets.is_some())?
        else {
            return Ok(Some(()));
        };
        if let Some(targets) = targets {
            let grad_output = to_f64s(&self.grad_output(&loss)?)?;
            let shape = Shape::new(dims, *class_dim);
            let logits_view = logits.view;
            let logits = to_f64s(&logits_view)?;
            let (expected_loss, expected_gradient) =
                self.formula.evaluate(&logits, 0., shape, &targets, &grad_output, dtype);
            assert_close("loss", &loss, &expected_loss)?;
            if let Some(gradient) = &gradients[0] {
                assert_close("gradient", gradient, &expected_gradient)?;
            }
            self.check_shards(&logits_view, &expected_loss, &expected_gradient)?;
            if self.wants_metrics() {
                let weighted = self.weigh(self.row_weights.as_ref())?;
                let result = weighted.forward_with_metrics(&logits_view, &self.targets);
                self.check_metrics(result, &loss, &logits, 0., shape, &targets, dtype)?;
            }
        }
        Ok(Some(()))
    }

    fn wants_metrics(&self) -> bool {
        self.input.more.as_ref().is_some_and(|more| more.wants_metrics)
    }

    /// The loss with these weights for the rows.
    fn weigh(&self, row_weights: Option<&Tensor>) -> Result<LabelSmoothingLoss> {
        Ok(match row_weights {
            Some(weights) => self.loss.weigh_rows(weights)?,
            None => self.loss.clone(),
        })
    }

    /// Splits the classes between three processes, of which the second has none. They run one after another.
    fn check_shards(
        &self,
        logits: &Tensor,
        expected_loss: &[Approx],
        expected_gradient: &[Approx],
    ) -> Result<()> {
        let loss = self.weigh(self.row_weights.as_ref())?;
        let num_classes = self.num_classes();
        let half = num_classes / 2;
        let ranges = [(0, half), (half, 0), (half, num_classes - half)];
        let part = |tensor: &Tensor, (first, len)| tensor.narrow(self.class_dim, first, len);
        let parts = ranges.map(|range| -> Result<_> {
            let targets = match self.targets.dtype().is_float() {
                true => part(&self.targets, range)?,
                false => self.targets.clone(),
            };
            let logits = Var::from_tensor(&contiguous_copy(&part(logits, range)?)?)?;
            Ok((logits, targets, Shard { first_class: range.0, num_classes }))
        });
        let parts = parts.into_iter().collect::<Result<Vec<_>>>()?;
        // A first run of each process keeps its states, and fails.
        let mut states = Vec::new();
        for (logits, targets, shard) in &parts {
            let gather = |sent: &Tensor| {
                states.push(sent.clone());
                Err(candle_core::Error::Msg("the others have not run".into()))
            };
            assert!(loss.forward_shard(logits, targets, *shard, gather).is_err());
        }
        let mut gradients = Vec::new();
        for (logits, targets, shard) in &parts {
            let gather = |_: &Tensor| Tensor::stack(&states, 0);
            let loss = loss.forward_shard(logits, targets, *shard, gather)?;
            assert_close("loss of shards", &loss, expected_loss)?;
            let grads = (&loss * self.grad_output(&loss)?)?.sum_all()?.backward()?;
            gradients.push(grads.get(logits).expect("a gradient").clone());
        }
        let gradient = Tensor::cat(&gradients, self.class_dim)?;
        assert_close("gradient of shards", &gradient, expected_gradient)
    }

    /// The result is that of a valid call, but for the targets, which must not be probabilities.
    #[allow(clippy::too_many_arguments, reason = "what one call got and returned")]
    fn check_metrics(
        &self,
        result: candle_label_smoothing::Result<(Tensor, Metrics)>,
        loss: &Tensor,
        logits: &[f64],
        logit_error: f64,
        shape: Shape,
        targets: &Targets,
        dtype: DType,
    ) -> Result<()> {
        let labels = match targets {
            Targets::Labels(labels) => Some(labels),
            Targets::Probabilities(_) => None,
        };
        let Some((actual_loss, metrics)) = check_validity(result, labels.is_some()) else {
            return Ok(());
        };
        assert_same_bits(&actual_loss, loss)?;
        let labels = labels.map_or(&[][..], |labels| labels);
        let expected = self.formula.metrics(logits, logit_error, shape, labels, dtype);
        let Metrics { nll, prediction, correct, confidence, entropy, lse, counted, .. } = &metrics;
        for (i, (name, field)) in
            [("nll", nll), ("confidence", confidence), ("entropy", entropy), ("lse", lse)]
                .into_iter()
                .enumerate()
        {
            let expected: Vec<Approx> = expected.iter().map(|row| row.values[i]).collect();
            assert_close(name, field, &expected)?;
        }
        let [predictions, correct, counted] = [prediction, correct, counted].map(to_f64s);
        for (row, ((prediction, correct), counted)) in
            predictions?.into_iter().zip(correct?).zip(counted?).enumerate()
        {
            let RowMetrics { values, predictions, counts } = &expected[row];
            assert_eq!(counted, f64::from(u8::from(*counts)), "{row}");
            assert!(predictions.contains(&(prediction as usize)), "{row}: {prediction}");
            let is_label = *counts && prediction == labels[row] as f64;
            let is_nan = values[3].value.is_nan();
            let is_unknown = !values[3].error.is_finite();
            assert!(is_unknown || correct == f64::from(u8::from(is_label && !is_nan)), "{row}");
        }
        Ok(())
    }

    fn grad_output(&self, loss: &Tensor) -> Result<Tensor> {
        self.input.grad_output.float_tensor(loss.dims(), loss.dtype())
    }

    /// Calls the loss with views and with contiguous copies of them, and asserts that both give the same bits. Returns
    /// the loss and the gradients of the copies, or `None` if the call is invalid.
    fn run_with_copies(
        &self,
        inputs: &[&BuiltTensor],
        call: impl Fn(
            &LabelSmoothingLoss,
            &[&Tensor],
            &Tensor,
        ) -> candle_label_smoothing::Result<Tensor>,
        is_valid: bool,
    ) -> Result<Option<(Tensor, Vec<Option<Tensor>>)>> {
        let views: Vec<&Tensor> = inputs.iter().map(|input| &input.view).collect();
        let result = call(&self.weigh(self.row_weights.as_ref())?, &views, &self.targets);
        let Some(loss) = check_validity(result, is_valid) else {
            return Ok(None);
        };
        let copies = inputs.iter().map(|BuiltTensor { base, view, .. }| match base.is_variable() {
            true => Ok(Var::from_tensor(&contiguous_copy(view)?)?.into_inner()),
            false => contiguous_copy(view),
        });
        let copies = copies.collect::<Result<Vec<Tensor>>>()?;
        let targets = contiguous_copy(&self.targets)?;
        let row_weights = self.row_weights.as_ref().map(contiguous_copy).transpose()?;
        let weighted = self.weigh(row_weights.as_ref())?;
        let copies_loss = call(&weighted, &copies.iter().collect::<Vec<_>>(), &targets)?;
        assert_same_bits(&loss, &copies_loss)?;
        let is_tracked = copies.iter().any(Tensor::is_variable);
        assert_eq!((loss.track_op(), copies_loss.track_op()), (is_tracked, is_tracked));
        if !is_tracked {
            return Ok(Some((copies_loss, vec![None; inputs.len()])));
        }
        let backward = |loss: &Tensor| (loss * self.grad_output(loss)?)?.sum_all()?.backward();
        let copies_grads = backward(&copies_loss)?;
        let gradients: Vec<_> = copies.iter().map(|copy| copies_grads.get(copy).cloned()).collect();
        // candle's own backward panics on some empty views.
        let is_nonempty = |input: &&BuiltTensor| element_count(input.view.dims()) > 0;
        let views_grads = match inputs.iter().all(is_nonempty) {
            true => Some(backward(&loss)?),
            false => None,
        };
        for (BuiltTensor { base, view, .. }, gradient) in inputs.iter().zip(&gradients) {
            assert_eq!(gradient.is_some(), base.is_variable());
            if let (Some(gradient), Some(views_grads)) = (gradient, &views_grads) {
                // candle maps the gradient of the copy back to the base of the view.
                let expected_grads = (view * gradient)?.sum_all()?.backward()?;
                let [actual, expected] =
                    [views_grads, &expected_grads].map(|grads| grads.get(base));
                assert_same_bits(actual.expect("a gradient"), expected.expect("a gradient"))?;
            }
        }
        Ok(Some((copies_loss, gradients)))
    }

    fn linear(&self) -> Result<Option<()>> {
        let Call::Linear { hidden_size, hidden, weight, bias, tile, mistake } = &self.input.call
        else {
            return Ok(None);
        };
        let Some((&classes, rows)) = self.dims.split_last() else {
            return Ok(None);
        };
        let (num_rows, hidden_size) = (element_count(rows), hidden_size.get());
        let tile =
            tile.map(|[rows, classes]| TileSize { rows: rows.into(), classes: classes.into() });
        let tiles = tile.map_or(1, |tile| {
            let row_tiles = if tile.rows < num_rows { num_rows } else { 1 };
            row_tiles.saturating_mul(classes.div_ceil(tile.classes.max(1)))
        });
        let work = num_rows.max(1).saturating_mul(classes).saturating_mul(hidden_size.max(1));
        let is_small = work <= 4 * MAX_ELEMENTS && tiles <= MAX_ELEMENTS / 64;
        let is_huge = hidden_size >= 1 << 45;
        // The size of such a call is refused before anything is computed.
        let is_refused = exceeds_address_space(&self.dims) || num_rows >= TOO_MANY_ROWS || is_huge;
        if hidden_size > MAX_ELEMENTS && !is_huge || !is_small && !is_refused {
            return Ok(None);
        }

        let mut hidden_dims = [rows, &[hidden_size]].concat();
        let mut weight_dims = vec![classes, hidden_size];
        let mut bias_dims = vec![classes];
        let dtype = hidden.dtype(4);
        let (mut weight_dtype, mut bias_dtype) = (dtype, dtype);
        match mistake.get() {
            Some(0) => hidden_dims.clear(),
            Some(1) => hidden_dims[rows.len()] += 1,
            // Without a bias, `weight` alone sets the number of classes, and one class more would be valid for labels.
            Some(2) => weight_dims[0] = classes.saturating_add(bias.is_some().into()),
            Some(3) => drop(weight_dims.pop()),
            Some(4) => bias_dims[0] = classes.saturating_add(1),
            Some(5) => bias_dims.push(1),
            Some(6) => weight_dtype = weight.dtype(4),
            Some(_) => bias_dtype = bias.as_ref().map_or(dtype, |bias| bias.dtype(4)),
            None => {}
        }
        let built = [
            hidden.floats(&hidden_dims, dtype)?,
            weight.floats(&weight_dims, weight_dtype)?,
            match bias {
                Some(bias) => bias.floats(&bias_dims, bias_dtype)?,
                None => hidden.floats(&[], dtype)?,
            },
        ];
        let [Some(hidden), Some(weight), Some(bias_tensor)] = built else {
            return Ok(None);
        };
        let fits = hidden_dims == [rows, &[hidden_size]].concat()
            && weight_dims == [classes, hidden_size]
            && (bias.is_none() || bias_dims == [classes])
            && self.class_dim == rows.len();
        let others = [Some(weight_dtype), bias.as_ref().map(|_| bias_dtype)];
        let is_mixed = others.iter().flatten().any(|other| *other != dtype);
        let may_mix = |dtype: &DType| matches!(dtype, DType::F16 | DType::BF16 | DType::F32);
        let fits =
            fits && (!is_mixed || [Some(dtype)].iter().chain(&others).flatten().all(may_mix));
        let dtype = if is_mixed { DType::F32 } else { dtype };
        let mut inputs = vec![&hidden, &weight];
        if bias.is_some() {
            inputs.push(&bias_tensor);
        }
        let call = |loss: &LabelSmoothingLoss, inputs: &[&Tensor], targets: &Tensor| {
            let [hidden, weight] = [inputs[0], inputs[1]];
            let bias = inputs.get(2).copied();
            match tile {
                Some(tile) => {
                    testing::forward_linear_tiled(loss, hidden, weight, bias, targets, tile)
                }
                None => loss.forward_linear(hidden, weight, bias, targets),
            }
        };
        if !is_small {
            let views: Vec<_> = inputs.iter().map(|input| &input.view).collect();
            drop(call(&self.weigh(self.row_weights.as_ref())?, &views, &self.targets));
            return Ok(Some(()));
        }
        let fits = fits && !inputs.iter().any(|input| input.is_truncated);
        let targets = if fits { self.valid_targets(dtype)? } else { None };
        let Some((loss, gradients)) = self.run_with_copies(&inputs, call, targets.is_some())?
        else {
            return Ok(Some(()));
        };
        let Some(targets) = targets else {
            return Ok(Some(()));
        };
        let grad_output = to_f64s(&self.grad_output(&loss)?)?;
        let result = self.wants_metrics().then(|| -> Result<_> {
            let weighted = self.weigh(self.row_weights.as_ref())?;
            let (hidden, weight, targets) = (&hidden.view, &weight.view, &self.targets);
            let bias = bias.is_some().then_some(&bias_tensor.view);
            Ok(match tile {
                Some(tile) => testing::forward_linear_tiled_with_metrics(
                    &weighted, hidden, weight, bias, targets, tile,
                ),
                None => weighted.forward_linear_with_metrics(hidden, weight, bias, targets),
            })
        });
        let result = result.transpose()?;
        let [hidden, weight] = [&hidden, &weight].map(|input| to_f64s(&input.view));
        let (hidden, weight) = (hidden?, weight?);
        let bias = if bias.is_some() { Some(to_f64s(&bias_tensor.view)?) } else { None };

        let unit_roundoff = unit_roundoff(compute_dtype(dtype));
        let max_terms = hidden_size.max(num_rows).max(classes);
        // sum + a·b, with a bound on the error of any order of summation of up to `max_terms` terms.
        let add_product = |sum: Approx, a: Approx, b: f64| {
            let term = a.mul(b);
            let rounding = (max_terms + 4) as f64 * unit_roundoff * term.value.abs();
            Approx { value: sum.value + term.value, error: sum.error + term.error + rounding }
        };
        let exact = |value| Approx { value, error: 0. };
        let mut logits = Vec::with_capacity(num_rows * classes);
        let mut logit_error = 0f64;
        for row in 0..num_rows {
            for class in 0..classes {
                let bias = bias.as_ref().map_or(0., |bias| bias[class]);
                let start = add_product(Approx::default(), exact(bias), 1.);
                let logit = (0..hidden_size).fold(start, |sum, i| {
                    let h = hidden[row * hidden_size + i];
                    add_product(sum, exact(h), weight[class * hidden_size + i])
                });
                logit_error =
                    if logit.error < 0.01 { logit_error.max(logit.error) } else { f64::INFINITY };
                logits.push(logit.value);
            }
        }
        let shape = Shape { rows: num_rows, classes, stride: 1 };
        let (expected_loss, grad_logits) =
            self.formula.evaluate(&logits, logit_error, shape, &targets, &grad_output, dtype);
        assert_close("loss", &loss, &expected_loss)?;
        if let Some(result) = result {
            self.check_metrics(result, &loss, &logits, logit_error, shape, &targets, dtype)?;
        }
        let [mut grad_hidden, mut grad_weight, mut grad_bias] =
            [hidden.len(), weight.len(), classes].map(|len| vec![Approx::default(); len]);
        for (i, grad_logit) in grad_logits.iter().enumerate() {
            let (row, class) = (i / classes, i % classes);
            for i in 0..hidden_size {
                let (h, w) = (row * hidden_size + i, class * hidden_size + i);
                grad_hidden[h] = add_product(grad_hidden[h], *grad_logit, weight[w]);
                grad_weight[w] = add_product(grad_weight[w], *grad_logit, hidden[h]);
            }
            grad_bias[class] = add_product(grad_bias[class], *grad_logit, 1.);
        }
        for (expected, gradient) in [grad_hidden, grad_weight, grad_bias].iter().zip(gradients) {
            if let Some(gradient) = gradient {
                assert_close("gradient", &gradient, expected)?;
            }
        }
        Ok(Some(()))
    }

    fn smooth_targets(&self, num_classes: usize) -> Result<Option<()>> {
        let dims = self.targets.dims();
        let is_probabilities = self.targets.dtype().is_float();
        if element_count(dims) > MAX_ELEMENTS
            && !exceeds_address_space(dims)
            && element_count(dims) < TOO_MANY_ROWS
        {
            return Ok(None);
        }
        let smoothed = smooth_targets(&self.targets, num_classes, &self.smoothing);
        let mut shape = dims.to_vec();
        if !is_probabilities {
            shape.push(num_classes);
        }
        if element_count(dims) > MAX_ELEMENTS || element_count(&shape) > MAX_ELEMENTS {
            return Ok(Some(()));
        }
        let fits = !exceeds_address_space(&shape)
            && self.smoothing_fits(num_classes)
            && !matches!(self.formula.kind, SmoothingKind::Unmasked)
            && shape.last() == Some(&num_classes)
            && (is_probabilities || num_classes <= MAX_CLASSES);
        let targets = if fits { self.read_targets(num_classes, None, |_| 1.)? } else { None };
        let smoothed = check_validity(smoothed, targets.is_some());
        if let (Some(smoothed), Some(targets)) = (smoothed, targets) {
            assert_eq!(smoothed.dims(), shape);
            let expected = (0..element_count(&shape)).map(|i| {
                let (row, class) = (i / num_classes, i % num_classes);
                let p = match &targets {
                    Targets::Labels(labels) => f64::from(u8::from(labels[row] == class as i64)),
                    Targets::Probabilities(p) => p[i],
                };
                let target = self.formula.target(p, class, num_classes);
                Approx { error: 8. * unit_roundoff(DType::F32) * target.error, ..target }
            });
            assert_close("target", &smoothed, &expected.collect::<Vec<_>>())?;
        }
        Ok(Some(()))
    }

    fn check_targets(&self, num_classes: usize) -> Result<Option<()>> {
        let dims = self.targets.dims();
        if element_count(dims) > MAX_ELEMENTS
            && !exceeds_address_space(dims)
            && element_count(dims) < TOO_MANY_ROWS
        {
            return Ok(None);
        }
        let ignore_index = self.formula.ignore_index;
        let checked = check_targets(&self.targets, num_classes, ignore_index);
        if element_count(dims) <= MAX_ELEMENTS {
            let is_valid = !exceeds_address_space(dims) && self.targets.dtype().is_int();
            let targets =
                if is_valid { self.read_targets(num_classes, ignore_index, |_| 1.)? } else { None };
            check_validity(checked, targets.is_some());
        }
        Ok(Some(()))
    }
}
