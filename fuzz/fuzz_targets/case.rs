//! A call of the loss: its tensors, whether it is valid, and the comparisons of its results.

use crate::arguments::Arguments;
use crate::compare::{
    assert_close, assert_same_bits, check_validity, contiguous_copy, element_count,
    exceeds_address_space, to_f64s,
};
use crate::formula::{
    Approx, Formula, RowMetrics, Shape, SmoothingKind, Targets, compute_dtype, unit_roundoff,
};
use crate::head::Head;
use crate::input::{BuiltTensor, Call, Comparison, Input, MAX_ELEMENTS, TensorSpec};
use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor};
use candle_label_smoothing::testing::TileSize;
use candle_label_smoothing::{
    LabelSmoothingLoss, Metrics, Shard, Smoothing, check_shards, check_targets, smooth_targets,
};
use std::ops::Range;

/// The largest number of classes that labels can have: the kernels index classes with 32 bits.
const MAX_CLASSES: usize = u32::MAX as usize;

/// This many rows need more memory than the allocator grants.
const TOO_MANY_ROWS: usize = 1 << 25;

/// Whether class targets or probabilities of this shape have too many elements to be checked, and too few to be refused.
fn takes_too_long(dims: &[usize]) -> bool {
    let len = element_count(dims);
    len > MAX_ELEMENTS && len < TOO_MANY_ROWS && !exceeds_address_space(dims)
}

pub struct Case<'a> {
    pub input: &'a Input<'a>,
    pub loss: LabelSmoothingLoss,
    pub smoothing: Smoothing,
    pub formula: Formula,
    /// The shape of the logits.
    pub dims: Vec<usize>,
    pub class_dim: usize,
    pub row_weights: Option<Tensor>,
    pub are_row_weights_valid: bool,
    pub targets: Tensor,
    pub are_targets_truncated: bool,
}

/// What a valid call must return.
struct Expected {
    shape: Shape,
    targets: Targets,
    dtype: DType,
    logits: Vec<f64>,
    logit_error: f64,
    head: Option<Head>,
    losses: Vec<Approx>,
    grad_logits: Vec<Approx>,
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
        // Row weights are rounded to the dtype of the arithmetic.
        let rounded = |weight: f64| match dtype {
            DType::F64 => weight,
            _ => f64::from(weight as f32),
        };
        let mut row_weights = formula.row_weights.iter().flatten();
        if !self.are_row_weights_valid || !row_weights.all(|weight| rounded(*weight).is_finite()) {
            return Ok(None);
        }
        if !(targets_fit && num_weights == num_classes && self.smoothing_fits(num_classes)) {
            return Ok(None);
        }
        let row_weight = |row| rounded(formula.row_weight(row));
        self.read_targets(num_classes, formula.ignore_index, row_weight)
    }

    fn arguments(&self, built: &[BuiltTensor], tile: Option<TileSize>) -> Arguments {
        let inputs = built.iter().map(|input| input.view.clone()).collect();
        let (targets, row_weights) = (self.targets.clone(), self.row_weights.clone());
        Arguments { inputs, targets, row_weights, tile }
    }

    pub fn forward(&self, logits: &TensorSpec) -> Result<Option<()>> {
        let Self { dims, class_dim, .. } = self;
        let classes = dims.get(*class_dim).copied().unwrap_or(1);
        let rows = element_count(dims) / classes.max(1);
        let is_small = element_count(dims) <= MAX_ELEMENTS;
        // From 2^45 classes on, the states of the blocks of a single row exceed the memory that the allocator grants.
        if !is_small && !exceeds_address_space(dims) && rows < TOO_MANY_ROWS && classes < 1 << 45 {
            return Ok(None);
        }
        let dtype = logits.dtype(4);
        let Some(logits) = logits.floats(dims, dtype)? else {
            return Ok(None);
        };
        let targets =
            if logits.is_truncated || !is_small { None } else { self.valid_targets(dtype)? };
        let built = [logits];
        let arguments = self.arguments(&built, None);
        if !is_small {
            assert!(arguments.call(&self.loss).is_err());
            return Ok(Some(()));
        }
        self.check(&built, &arguments, targets, dtype)
    }

    pub fn linear(&self) -> Result<Option<()>> {
        let Call::Linear { hidden_size, tile, .. } = &self.input.call else {
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
        let is_small = work <= 4 * MAX_ELEMENTS && tiles <= MAX_ELEMENTS / 16;
        let is_huge = hidden_size >= 1 << 45;
        // The size of such a call is refused before anything is computed.
        let is_refused = exceeds_address_space(&self.dims) || num_rows >= TOO_MANY_ROWS || is_huge;
        if hidden_size > MAX_ELEMENTS && !is_huge || !is_small && !is_refused {
            return Ok(None);
        }

        let Some((built, dtype, fits)) = self.head()? else {
            return Ok(None);
        };
        let fits = fits && is_small && !built.iter().any(|input| input.is_truncated);
        let arguments = self.arguments(&built, tile);
        if !is_small {
            assert!(arguments.call(&self.loss).is_err());
            return Ok(Some(()));
        }
        let targets = if fits { self.valid_targets(dtype)? } else { None };
        self.check(&built, &arguments, targets, dtype)
    }

    /// The hidden states, the weight and maybe the bias, the dtype of their logits, and whether they fit together.
    fn head(&self) -> Result<Option<(Vec<BuiltTensor>, DType, bool)>> {
        let Call::Linear { hidden_size, hidden, weight, bias, mistake, .. } = &self.input.call
        else {
            return Ok(None);
        };
        let Some((&classes, rows)) = self.dims.split_last() else {
            return Ok(None);
        };
        let hidden_size = hidden_size.get();
        let mut hidden_dims = [rows, &[hidden_size]].concat();
        let mut weight_dims = vec![classes, hidden_size];
        let mut bias_dims = vec![classes];
        let dtype = hidden.dtype(4);
        let (mut weight_dtype, mut bias_dtype) = (dtype, dtype);
        match mistake.get() {
            Some(0) => hidden_dims.clear(),
            Some(1) => hidden_dims[rows.len()] = hidden_size.wrapping_add(1),
            // Without a bias, `weight` alone sets the number of classes, and one class more would be valid for labels.
            Some(2) => weight_dims[0] = classes.saturating_add(bias.is_some().into()),
            Some(3) => drop(weight_dims.pop()),
            Some(4) => bias_dims[0] = classes.saturating_add(1),
            Some(5) => bias_dims.push(1),
            Some(6) => weight_dtype = weight.dtype(4),
            Some(_) => bias_dtype = bias.as_ref().map_or(dtype, |bias| bias.dtype(4)),
            None => {}
        }
        let mut built =
            vec![hidden.floats(&hidden_dims, dtype)?, weight.floats(&weight_dims, weight_dtype)?];
        if let Some(bias) = bias {
            built.push(bias.floats(&bias_dims, bias_dtype)?);
        }
        let Some(built) = built.into_iter().collect::<Option<Vec<_>>>() else {
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
        Ok(Some((built, dtype, fits)))
    }

    /// Checks the results of a call. It is invalid if there are no targets.
    fn check(
        &self,
        built: &[BuiltTensor],
        views: &Arguments,
        targets: Option<Targets>,
        dtype: DType,
    ) -> Result<Option<()>> {
        let loss = check_validity(views.call(&self.loss), targets.is_some());
        let (Some(loss), Some(targets)) = (loss, targets) else {
            return Ok(Some(()));
        };
        assert_eq!(loss.track_op(), views.is_tracked());
        // candle gives the gradient to the base of a view, so gradients are read from copies.
        let compares_views = matches!(self.input.comparison, Comparison::Views);
        let needs_copies = views.is_tracked() || compares_views;
        // candle cannot copy an empty view whose other lengths exceed the address space.
        if needs_copies && built.iter().any(|input| exceeds_address_space(input.view.dims())) {
            return Ok(Some(()));
        }
        let copies = if needs_copies { Some(views.copies()?) } else { None };
        let arguments = copies.as_ref().unwrap_or(views);
        let mut gradients = vec![];
        if let Some(copies) = &copies {
            let copied = copies.call(&self.loss)?;
            assert_same_bits(&loss, &copied)?;
            gradients = self.gradients(copies, &copied)?;
        }
        let grad_output = to_f64s(&self.grad_output(&loss)?)?;
        let shape = Shape::new(&self.dims, self.class_dim);
        let head = match &arguments.inputs[..] {
            [_] => None,
            inputs => Some(Head::new(inputs, shape, compute_dtype(dtype))?),
        };
        let (logits, logit_error) = match &head {
            Some(head) => head.logits(),
            None => (to_f64s(&arguments.inputs[0])?, 0.),
        };
        let (losses, grad_logits) =
            self.formula.evaluate(&logits, logit_error, shape, &targets, &grad_output, dtype);
        let expected =
            Expected { shape, targets, dtype, logits, logit_error, head, losses, grad_logits };

        assert_close("loss", &loss, &expected.losses)?;
        expected.check_gradients(&gradients, 0..shape.classes)?;
        match self.input.comparison {
            Comparison::Formula => {}
            Comparison::Views => self.check_views(built, &loss, &gradients)?,
            Comparison::Metrics => self.check_metrics(arguments, &loss, &expected)?,
            Comparison::Shards(limits) => self.check_shards(arguments, limits, &expected)?,
        }
        Ok(Some(()))
    }

    /// A gradient for each input that is a variable.
    fn gradients(&self, arguments: &Arguments, loss: &Tensor) -> Result<Vec<Option<Tensor>>> {
        if !arguments.is_tracked() {
            return Ok(vec![]);
        }
        let grads = self.backward(loss)?;
        let gradient = |input: &Tensor| {
            let gradient = grads.get(input).cloned();
            assert_eq!(gradient.is_some(), input.is_variable());
            gradient
        };
        Ok(arguments.inputs.iter().map(gradient).collect())
    }

    fn backward(&self, loss: &Tensor) -> Result<GradStore> {
        (loss * self.grad_output(loss)?)?.sum_all()?.backward()
    }

    fn grad_output(&self, loss: &Tensor) -> Result<Tensor> {
        self.input.grad_output.float_tensor(loss.dims(), loss.dtype())
    }

    /// The gradient that reaches the bases of the views must have the bits of what candle makes of the copies' gradients.
    fn check_views(
        &self,
        built: &[BuiltTensor],
        loss: &Tensor,
        gradients: &[Option<Tensor>],
    ) -> Result<()> {
        // candle's own backward panics on some empty views.
        let has_empty = built.iter().any(|input| element_count(input.view.dims()) == 0);
        if has_empty || !loss.track_op() {
            return Ok(());
        }
        let grads = self.backward(loss)?;
        for (BuiltTensor { base, view, .. }, gradient) in built.iter().zip(gradients) {
            assert_eq!(grads.get(base).is_some(), base.is_variable());
            if let (Some(actual), Some(gradient)) = (grads.get(base), gradient) {
                let expected = (view * gradient)?.sum_all()?.backward()?;
                assert_same_bits(actual, expected.get(base).expect("a gradient"))?;
            }
        }
        Ok(())
    }

    /// The call over three processes, which run one after another.
    fn check_shards(
        &self,
        arguments: &Arguments,
        limits: [u8; 2],
        expected: &Expected,
    ) -> Result<()> {
        let num_classes = self.num_classes();
        let mut limits = limits.map(|limit| usize::from(limit) % (num_classes + 1));
        limits.sort_unstable();
        let ranges = [0..limits[0], limits[0]..limits[1], limits[1]..num_classes];
        // In a first run, each process fails after its numbers are collected.
        let mut states = Vec::new();
        let mut facts = Vec::new();
        let mut processes = Vec::new();
        for range in &ranges {
            let process = arguments.of_classes(self.class_dim, range)?;
            let shard = Shard { first_class: range.start, num_classes };
            let collect = |tensor: &Tensor, to: &mut Vec<Tensor>| {
                to.push(tensor.clone());
                Err(candle_core::Error::Msg("the others have not run".into()))
            };
            let gather = |sent: &Tensor| collect(sent, &mut states);
            assert!(process.call_shard(&self.loss, shard, gather).is_err());
            if !self.targets.dtype().is_float() {
                let gather = |sent: &Tensor| collect(sent, &mut facts);
                assert!(check_shards(&process.targets, shard, range.len(), gather).is_err());
            }
            processes.push((process, shard));
        }
        for ((process, shard), range) in processes.iter().zip(ranges) {
            if !self.targets.dtype().is_float() {
                let gather = |_: &Tensor| Tensor::stack(&facts, 0);
                check_shards(&process.targets, *shard, range.len(), gather)?;
            }
            let gather = |_: &Tensor| Tensor::stack(&states, 0);
            let loss = process.call_shard(&self.loss, *shard, gather)?;
            assert_close("loss of shards", &loss, &expected.losses)?;
            expected.check_gradients(&self.gradients(process, &loss)?, range)?;
        }
        Ok(())
    }

    /// The call is valid with metrics too, unless the targets are probabilities.
    fn check_metrics(
        &self,
        arguments: &Arguments,
        loss: &Tensor,
        expected: &Expected,
    ) -> Result<()> {
        let labels = match &expected.targets {
            Targets::Labels(labels) => Some(labels),
            Targets::Probabilities(_) => None,
        };
        let result = arguments.call_with_metrics(&self.loss);
        let Some((actual_loss, metrics)) = check_validity(result, labels.is_some()) else {
            return Ok(());
        };
        assert_same_bits(&actual_loss, loss)?;
        let labels = labels.map_or(&[][..], |labels| labels);
        let Expected { logits, logit_error, shape, dtype, .. } = expected;
        if !self.formula.row_weights_are_in_range(*dtype) {
            return Ok(());
        }
        let expected = self.formula.metrics(logits, *logit_error, *shape, labels, *dtype);
        let Metrics { nll, prediction, correct, confidence, entropy, lse, counted, .. } = &metrics;
        let fields = [("nll", nll), ("confidence", confidence), ("entropy", entropy), ("lse", lse)];
        for (i, (name, field)) in fields.into_iter().enumerate() {
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

    pub fn smooth_targets(&self, num_classes: usize) -> Result<Option<()>> {
        let dims = self.targets.dims();
        let is_probabilities = self.targets.dtype().is_float();
        if takes_too_long(dims) {
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

    pub fn check_targets(&self, num_classes: usize) -> Result<Option<()>> {
        let dims = self.targets.dims();
        if takes_too_long(dims) {
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

impl Expected {
    /// The gradients of the inputs of a process that has some of the classes.
    fn gradients(&self, classes: Range<usize>) -> Vec<Vec<Approx>> {
        match &self.head {
            Some(head) => head.gradients(&self.grad_logits, classes).into(),
            None => vec![self.shape.of_classes(&self.grad_logits, classes)],
        }
    }

    #[track_caller]
    fn check_gradients(&self, gradients: &[Option<Tensor>], classes: Range<usize>) -> Result<()> {
        for (gradient, expected) in gradients.iter().zip(self.gradients(classes)) {
            if let Some(gradient) = gradient {
                assert_close("gradient", gradient, &expected)?;
            }
        }
        Ok(())
    }
}
