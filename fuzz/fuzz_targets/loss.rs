//! Every public function on whatever fits into tensors. There is an error exactly where there should be one; otherwise
//! the numbers are those of the formula, and views give the same bits as their copies. Nothing panics or hangs, and
//! memory that is not there is refused.
//!
//! candle's own limits are avoided: its conversions and sums panic on empty views that begin beyond their storage,
//! and abort on views that are larger than memory.
//!
//! With cargo-fuzz (`RUSTC_BOOTSTRAP=1` lets a stable compiler do what it asks for), the stored inputs once, and new
//! ones for an hour:
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
    Error, LabelSmoothingLoss, Reduction, Smoothing, check_targets, smooth_targets,
};
use formula::{Aims, Formula, Kind, Near, Shape, arithmetic, unit};
use input::{Call, Convention, Given, Input, LONGEST, Made, Options, Vector};
use libfuzzer_sys::{Corpus, fuzz_target};
use std::ffi::{CStr, c_char};

/// Larger allocations are refused, as those beyond memory are. The loss has to see to it.
#[unsafe(no_mangle)]
extern "C" fn __asan_default_options() -> *const c_char {
    const OPTIONS: &CStr = c"allocator_may_return_null=1:max_allocation_size_mb=64";
    OPTIONS.as_ptr()
}

/// Class indices have 32 bits.
const MOST_CLASSES: usize = u32::MAX as usize;

/// So many rows take more memory than there is.
const REFUSED: usize = 1 << 25;

fuzz_target!(|input: Input| -> Corpus {
    match run(&input) {
        Ok(Some(())) => Corpus::Keep,
        // It would have taken too long.
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
    let Some((loss, smoothing, formula)) = options(&input.options, num_classes)? else {
        return Ok(None);
    };
    let mut rows = dims.clone();
    if class_dim < rows.len() {
        rows.remove(class_dim);
    }
    let dtype = input.targets.dtype(9);
    let mut targets_dims = if dtype.is_float() { &dims } else { &rows }.clone();
    match input.targets_misfit.get() {
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
    let test = Test {
        input,
        loss,
        smoothing,
        formula,
        dims,
        class_dim,
        targets: targets.view,
        are_targets_short: targets.is_short,
    };
    match &input.call {
        Call::Forward { logits } => test.forward(logits),
        Call::Linear { .. } => test.linear(),
        Call::SmoothTargets { num_classes: len } => {
            test.smooth_targets(len.map_or(num_classes, |len| len.get()))
        }
        Call::CheckTargets { num_classes: len } => {
            test.check_targets(len.map_or(num_classes, |len| len.get()))
        }
    }
}

/// That there is an error exactly where there should be one.
#[track_caller]
fn check<T>(result: std::result::Result<T, Error>, is_valid: bool) -> Option<T> {
    match result {
        Ok(value) => {
            assert!(is_valid, "no error");
            Some(value)
        }
        Err(error) => {
            let message = error.to_string();
            assert!(!is_valid && !matches!(error, Error::Candle(_)), "{message}");
            None
        }
    }
}

/// The options, as the crate takes them and as the formula does. Those that are wrong are left out.
fn options(
    given: &Options,
    num_classes: usize,
) -> Result<Option<(LabelSmoothingLoss, Smoothing, Formula)>> {
    let num_classes = if num_classes > LONGEST { 3 } else { num_classes };
    let make = |vector: &Vector, is_prior| -> Result<Option<_>> {
        let Some(Made { view: tensor, is_short, .. }) = vector.make(num_classes, is_prior)? else {
            return Ok(None);
        };
        let is_vector = tensor.rank() == 1
            && !is_short
            && size(tensor.dims()) <= LONGEST
            && tensor.dtype().is_float()
            && tensor.dtype() != DType::F8E8M0;
        let values = if is_vector { Some(read(&tensor)?) } else { None };
        let are_good = |values: &Vec<f64>| values.iter().all(|v| v.is_finite() && *v >= 0.);
        Ok(Some((tensor, values.filter(are_good))))
    };
    let is_proportion = |epsilon: f64| (0. ..=1.).contains(&epsilon);
    let (epsilon, smoothing, kind) = match &given.convention {
        Convention::None => (0., Ok(Smoothing::none()), Some(Kind::None)),
        Convention::All(epsilon) => {
            let epsilon = epsilon.get();
            (epsilon, Smoothing::over_all(epsilon), Some(Kind::All))
        }
        Convention::Others(epsilon) => {
            let epsilon = epsilon.get();
            (epsilon, Smoothing::over_others(epsilon), Some(Kind::Others))
        }
        Convention::Toward(epsilon, prior) => {
            let Some((tensor, prior)) = make(prior, true)? else {
                return Ok(None);
            };
            let epsilon = epsilon.get();
            let kind = prior.and_then(|mut prior| {
                let sum = prior.iter().fold(0., |sum, p| sum + p);
                prior.iter_mut().for_each(|p| *p /= sum);
                ((sum - 1.).abs() <= 1e-3).then_some(Kind::Toward(prior))
            });
            (epsilon, Smoothing::toward(epsilon, &tensor), kind)
        }
    };
    let kind = kind.filter(|_| is_proportion(epsilon));
    let smoothing = check(smoothing, kind.is_some()).unwrap_or(Smoothing::none());
    let reduction =
        [Reduction::Mean, Reduction::Sum, Reduction::None][usize::from(given.reduction) % 3];
    let mut loss = LabelSmoothingLoss::new(smoothing.clone()).with_reduction(reduction);
    let mut formula = Formula {
        epsilon: if kind.is_some() { epsilon } else { 0. },
        kind: kind.unwrap_or(Kind::None),
        class_weights: None,
        ignore_index: given.ignore_index.as_ref().map(|index| index.get()),
        z_loss: 0.,
        reduction,
    };
    if let Some(weights) = &given.class_weights {
        let Some((tensor, weights)) = make(weights, false)? else {
            return Ok(None);
        };
        let weighted = loss.clone().with_class_weights(&tensor);
        loss = check(weighted, weights.is_some()).unwrap_or(loss);
        formula.class_weights = weights;
    }
    if let Some(index) = formula.ignore_index {
        loss = loss.with_ignore_index(index);
    }
    match given.class_dim {
        None => {}
        Some(255) => loss = loss.with_class_dim(usize::MAX),
        Some(dim) => loss = loss.with_class_dim(usize::from(dim) % 6),
    }
    if let Some(z_loss) = &given.z_loss {
        let z_loss = z_loss.get();
        let is_valid = z_loss.is_finite() && z_loss >= 0.;
        loss = check(loss.clone().with_z_loss(z_loss), is_valid).unwrap_or(loss);
        formula.z_loss = if is_valid { z_loss } else { 0. };
    }
    Ok(Some((loss, smoothing, formula)))
}

/// How many elements there are, or would be.
fn size(dims: &[usize]) -> usize {
    if dims.contains(&0) { 0 } else { extent(dims) }
}

/// The same without the dimensions that are empty.
fn extent(dims: &[usize]) -> usize {
    let lens = dims.iter().filter(|len| **len != 0);
    lens.fold(1, |product, &len| product.saturating_mul(len))
}

/// Whether the size is for sure one that cannot be addressed.
fn is_absurd(dims: &[usize]) -> bool {
    extent(dims) > isize::MAX as usize / 8
}

/// A tensor of its own.
fn copy(view: &Tensor) -> Result<Tensor> {
    match view.dims().contains(&0) {
        true => Tensor::zeros(view.dims(), view.dtype(), &Device::Cpu),
        false => view.detach().force_contiguous(),
    }
}

fn read(tensor: &Tensor) -> Result<Vec<f64>> {
    let tensor = copy(tensor)?.flatten_all()?;
    match tensor.dtype() {
        // The way from f8 to f64 never ends in candle 0.11.1.
        DType::F8E4M3 => tensor.to_dtype(DType::F32)?.to_dtype(DType::F64)?.to_vec1(),
        _ => tensor.to_dtype(DType::F64)?.to_vec1(),
    }
}

#[track_caller]
fn assert_same(ours: &Tensor, theirs: &Tensor) -> Result<()> {
    assert_eq!((ours.dims(), ours.dtype()), (theirs.dims(), theirs.dtype()));
    for (ours, theirs) in read(ours)?.iter().zip(read(theirs)?) {
        let is_same = ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan();
        assert!(is_same, "{ours} and {theirs}");
    }
    Ok(())
}

#[track_caller]
fn assert_near(what: &str, ours: &Tensor, expected: &[Near]) -> Result<()> {
    let (dtype, ours) = (ours.dtype(), read(ours)?);
    assert_eq!(ours.len(), expected.len(), "{what}");
    for (i, (ours, expected)) in ours.iter().zip(expected).enumerate() {
        let expected = expected.rounded_to(dtype);
        assert!(expected.holds(*ours), "{what} {i}: {ours}, expected {expected:?}");
    }
    Ok(())
}

struct Test<'a> {
    input: &'a Input<'a>,
    loss: LabelSmoothingLoss,
    smoothing: Smoothing,
    formula: Formula,
    /// Those of the logits.
    dims: Vec<usize>,
    class_dim: usize,
    targets: Tensor,
    are_targets_short: bool,
}

impl Test<'_> {
    fn num_classes(&self) -> usize {
        self.dims[self.class_dim]
    }

    /// What the targets say, if they are valid.
    fn aims(&self, num_classes: usize, ignore_index: Option<i64>) -> Result<Option<Aims>> {
        let dtype = self.targets.dtype();
        if dtype == DType::F8E8M0 || self.are_targets_short {
            return Ok(None);
        }
        if dtype.is_float() {
            return Ok(Some(Aims::Probabilities(read(&self.targets)?)));
        }
        let labels: Vec<i64> =
            copy(&self.targets)?.to_dtype(DType::I64)?.flatten_all()?.to_vec1()?;
        let is_good = |label: &i64| {
            usize::try_from(*label).is_ok_and(|label| label < num_classes)
                || Some(*label) == ignore_index
        };
        Ok(labels.iter().all(is_good).then_some(Aims::Labels(labels)))
    }

    /// Whether the smoothing is one of so many classes.
    fn is_smoothing_of(&self, num_classes: usize) -> bool {
        match &self.formula.kind {
            Kind::None | Kind::All => num_classes > 0,
            Kind::Others => num_classes > 1,
            Kind::Toward(prior) => num_classes > 0 && prior.len() == num_classes,
        }
    }

    /// What the targets say, if all but the logits' numbers is valid.
    fn valid(&self, dtype: DType) -> Result<Option<Aims>> {
        let Self { formula, dims, class_dim, .. } = self;
        let is_logits = matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64);
        if !is_logits || *class_dim >= dims.len() || is_absurd(dims) {
            return Ok(None);
        }
        let num_classes = self.num_classes();
        let weights = formula.class_weights.as_ref().map_or(num_classes, Vec::len);
        let shares = 2f64.powi(24);
        let possible = match dtype {
            DType::F64 => f64::MIN_POSITIVE * shares..=f64::MAX / shares,
            _ => f64::from(f32::MIN_POSITIVE) * shares..=f64::from(f32::MAX) / shares,
        };
        let is_possible = |weight: &f64| *weight == 0. || possible.contains(weight);
        if !formula.class_weights.iter().flatten().all(is_possible) {
            return Ok(None);
        }
        let mut rows = dims.clone();
        rows.remove(*class_dim);
        let fit = match self.targets.dtype().is_float() {
            true => self.targets.dims() == dims && formula.ignore_index.is_none(),
            false => self.targets.dims() == rows && num_classes <= MOST_CLASSES,
        };
        if !(fit && weights == num_classes && self.is_smoothing_of(num_classes)) {
            return Ok(None);
        }
        self.aims(num_classes, formula.ignore_index)
    }

    fn forward(&self, logits: &Given) -> Result<Option<()>> {
        let Self { dims, class_dim, .. } = self;
        let classes = dims.get(*class_dim).copied().unwrap_or(1);
        let rows = size(dims) / classes.max(1);
        let is_small = size(dims) <= LONGEST;
        // The latter is refused for what is kept of the parts of each row.
        if !is_small && !is_absurd(dims) && rows < REFUSED && classes < 1 << 45 {
            return Ok(None);
        }
        let dtype = logits.dtype(4);
        let Some(made) = logits.floats(dims, dtype)? else {
            return Ok(None);
        };
        let call = |loss: &LabelSmoothingLoss, operands: &[&Tensor], targets: &Tensor| {
            loss.forward(operands[0], targets)
        };
        if !is_small {
            drop(call(&self.loss, &[&made.view], &self.targets));
            return Ok(Some(()));
        }
        let aims = if made.is_short { None } else { self.valid(dtype)? };
        let Some((loss, gradients)) = self.twice(&[&made], call, aims.is_some())? else {
            return Ok(Some(()));
        };
        if let Some(aims) = aims {
            let upstream = read(&self.upstream(&loss)?)?;
            let shape = Shape::new(dims, *class_dim);
            let logits = read(&made.view)?;
            let (losses, gradient) =
                self.formula.evaluate(&logits, 0., shape, &aims, &upstream, dtype);
            assert_near("loss", &loss, &losses)?;
            if let Some(ours) = &gradients[0] {
                assert_near("gradient", ours, &gradient)?;
            }
        }
        Ok(Some(()))
    }

    fn upstream(&self, loss: &Tensor) -> Result<Tensor> {
        self.input.upstream.floats(loss.dims(), loss.dtype())
    }

    /// The loss of views and of their copies, which is the same, and the gradients of these.
    fn twice(
        &self,
        made: &[&Made],
        call: impl Fn(
            &LabelSmoothingLoss,
            &[&Tensor],
            &Tensor,
        ) -> candle_label_smoothing::Result<Tensor>,
        is_valid: bool,
    ) -> Result<Option<(Tensor, Vec<Option<Tensor>>)>> {
        let views: Vec<&Tensor> = made.iter().map(|made| &made.view).collect();
        let Some(loss) = check(call(&self.loss, &views, &self.targets), is_valid) else {
            return Ok(None);
        };
        let copies = made.iter().map(|Made { base, view, .. }| match base.is_variable() {
            true => Ok(Var::from_tensor(&copy(view)?)?.into_inner()),
            false => copy(view),
        });
        let copies = copies.collect::<Result<Vec<Tensor>>>()?;
        let again = call(&self.loss, &copies.iter().collect::<Vec<_>>(), &copy(&self.targets)?)?;
        assert_same(&loss, &again)?;
        let is_tracked = copies.iter().any(Tensor::is_variable);
        assert_eq!((loss.track_op(), again.track_op()), (is_tracked, is_tracked));
        if !is_tracked {
            return Ok(Some((again, vec![None; made.len()])));
        }
        let backward = |loss: &Tensor| (loss * self.upstream(loss)?)?.sum_all()?.backward();
        let of_copies = backward(&again)?;
        let gradients: Vec<_> = copies.iter().map(|copy| of_copies.get(copy).cloned()).collect();
        let has_numbers = |made: &&Made| size(made.view.dims()) > 0;
        let of_views = match made.iter().all(has_numbers) {
            true => Some(backward(&loss)?),
            false => None,
        };
        for (Made { base, view, .. }, gradient) in made.iter().zip(&gradients) {
            assert_eq!(gradient.is_some(), base.is_variable());
            if let (Some(gradient), Some(of_views)) = (gradient, &of_views) {
                let expected = (view * gradient)?.sum_all()?.backward()?;
                let [ours, theirs] = [of_views, &expected].map(|of| of.get(base));
                assert_same(ours.expect("a gradient"), theirs.expect("a gradient"))?;
            }
        }
        Ok(Some((again, gradients)))
    }

    fn linear(&self) -> Result<Option<()>> {
        let Call::Linear { size: hidden_size, hidden, weight, bias, tile, misfit } =
            &self.input.call
        else {
            return Ok(None);
        };
        let Some((&classes, rows)) = self.dims.split_last() else {
            return Ok(None);
        };
        let (num_rows, hidden_size) = (size(rows), hidden_size.get());
        let tile =
            tile.map(|[rows, classes]| TileSize { rows: rows.into(), classes: classes.into() });
        let tiles = tile.map_or(1, |tile| {
            let slices = if tile.rows < num_rows { num_rows } else { 1 };
            slices.saturating_mul(classes.div_ceil(tile.classes.max(1)))
        });
        let work = num_rows.max(1).saturating_mul(classes).saturating_mul(hidden_size.max(1));
        let is_small = work <= 4 * LONGEST && tiles <= LONGEST / 64;
        let is_beyond = hidden_size >= 1 << 45;
        let is_refused = is_absurd(&self.dims) || num_rows >= REFUSED || is_beyond;
        if hidden_size > LONGEST && !is_beyond || !is_small && !is_refused {
            return Ok(None);
        }

        let mut hidden_dims = [rows, &[hidden_size]].concat();
        let mut weight_dims = vec![classes, hidden_size];
        let mut bias_dims = vec![classes];
        let dtype = hidden.dtype(4);
        let (mut of_weight, mut of_bias) = (dtype, dtype);
        match misfit.get() {
            Some(0) => hidden_dims.clear(),
            Some(1) => hidden_dims[rows.len()] += 1,
            // Without a bias, only the targets could tell.
            Some(2) => weight_dims[0] = classes.saturating_add(bias.is_some().into()),
            Some(3) => drop(weight_dims.pop()),
            Some(4) => bias_dims[0] = classes.saturating_add(1),
            Some(5) => bias_dims.push(1),
            Some(6) => of_weight = weight.dtype(4),
            Some(_) => of_bias = bias.as_ref().map_or(dtype, |bias| bias.dtype(4)),
            None => {}
        }
        let made = [
            hidden.floats(&hidden_dims, dtype)?,
            weight.floats(&weight_dims, of_weight)?,
            match bias {
                Some(bias) => bias.floats(&bias_dims, of_bias)?,
                None => hidden.floats(&[], dtype)?,
            },
        ];
        let [Some(hidden), Some(weight), Some(of_classes)] = made else {
            return Ok(None);
        };
        let fits = hidden_dims == [rows, &[hidden_size]].concat()
            && weight_dims == [classes, hidden_size]
            && of_weight == dtype
            && (bias.is_none() || bias_dims == [classes] && of_bias == dtype)
            && self.class_dim == rows.len();
        let mut made = vec![&hidden, &weight];
        if bias.is_some() {
            made.push(&of_classes);
        }
        let call = |loss: &LabelSmoothingLoss, operands: &[&Tensor], targets: &Tensor| {
            let [hidden, weight] = [operands[0], operands[1]];
            let bias = operands.get(2).copied();
            match tile {
                Some(tile) => {
                    testing::forward_linear_tiled(loss, hidden, weight, bias, targets, tile)
                }
                None => loss.forward_linear(hidden, weight, bias, targets),
            }
        };
        if !is_small {
            let operands: Vec<_> = made.iter().map(|made| &made.view).collect();
            drop(call(&self.loss, &operands, &self.targets));
            return Ok(Some(()));
        }
        let fits = fits && !made.iter().any(|made| made.is_short);
        let aims = if fits { self.valid(dtype)? } else { None };
        let Some((loss, gradients)) = self.twice(&made, call, aims.is_some())? else {
            return Ok(Some(()));
        };
        let Some(aims) = aims else {
            return Ok(Some(()));
        };
        let upstream = read(&self.upstream(&loss)?)?;
        let [hidden, weight] = [&hidden, &weight].map(|made| read(&made.view));
        let (hidden, weight) = (hidden?, weight?);
        let bias = if bias.is_some() { Some(read(&of_classes.view)?) } else { None };

        // The products, and what rounding they may differ by.
        let unit = unit(arithmetic(dtype));
        let mut slack = 0f64;
        let mut logits = Vec::with_capacity(num_rows * classes);
        let product = |sum: Near, a: Near, b: f64| {
            let term = a.times(b);
            // The magnitude.
            let error = sum.error
                + term.error
                + (hidden_size.max(num_rows).max(classes) + 4) as f64 * unit * term.value.abs();
            Near { value: sum.value + term.value, error }
        };
        let exact = |value| Near { value, error: 0. };
        for row in 0..num_rows {
            for class in 0..classes {
                let bias = bias.as_ref().map_or(0., |bias| bias[class]);
                let start = product(Near::default(), exact(bias), 1.);
                let logit = (0..hidden_size).fold(start, |sum, i| {
                    let h = hidden[row * hidden_size + i];
                    product(sum, exact(h), weight[class * hidden_size + i])
                });
                slack = if logit.error < 0.01 { slack.max(logit.error) } else { f64::INFINITY };
                logits.push(logit.value);
            }
        }
        let shape = Shape { rows: num_rows, classes, stride: 1 };
        let (losses, gradient) =
            self.formula.evaluate(&logits, slack, shape, &aims, &upstream, dtype);
        assert_near("loss", &loss, &losses)?;
        let mut expected =
            [hidden.len(), weight.len(), classes].map(|len| vec![Near::default(); len]);
        for (at, gradient) in gradient.iter().enumerate() {
            let (row, class) = (at / classes, at % classes);
            for i in 0..hidden_size {
                let (h, w) = (row * hidden_size + i, class * hidden_size + i);
                expected[0][h] = product(expected[0][h], *gradient, weight[w]);
                expected[1][w] = product(expected[1][w], *gradient, hidden[h]);
            }
            expected[2][class] = product(expected[2][class], *gradient, 1.);
        }
        for (expected, ours) in expected.iter().zip(gradients) {
            if let Some(ours) = ours {
                assert_near("gradient", &ours, expected)?;
            }
        }
        Ok(Some(()))
    }

    fn smooth_targets(&self, num_classes: usize) -> Result<Option<()>> {
        let dims = self.targets.dims();
        let is_soft = self.targets.dtype().is_float();
        if size(dims) > LONGEST && !is_absurd(dims) && size(dims) < REFUSED {
            return Ok(None);
        }
        let soft = smooth_targets(&self.targets, num_classes, &self.smoothing);
        let mut shape = dims.to_vec();
        if !is_soft {
            shape.push(num_classes);
        }
        if size(dims) > LONGEST || size(&shape) > LONGEST {
            return Ok(Some(()));
        }
        let fits = !is_absurd(&shape)
            && self.is_smoothing_of(num_classes)
            && shape.last() == Some(&num_classes)
            && (is_soft || num_classes <= MOST_CLASSES);
        let aims = if fits { self.aims(num_classes, None)? } else { None };
        if let (Some(soft), Some(aims)) = (check(soft, aims.is_some()), aims) {
            assert_eq!(soft.dims(), shape);
            let expected = (0..size(&shape)).map(|i| {
                let (row, class) = (i / num_classes, i % num_classes);
                let p = match &aims {
                    Aims::Labels(labels) => f64::from(u8::from(labels[row] == class as i64)),
                    Aims::Probabilities(p) => p[i],
                };
                let target = self.formula.target(p, class, num_classes);
                Near { error: 8. * unit(DType::F32) * target.error, ..target }
            });
            assert_near("target", &soft, &expected.collect::<Vec<_>>())?;
        }
        Ok(Some(()))
    }

    fn check_targets(&self, num_classes: usize) -> Result<Option<()>> {
        let dims = self.targets.dims();
        if size(dims) > LONGEST && !is_absurd(dims) && size(dims) < REFUSED {
            return Ok(None);
        }
        let ignore_index = self.formula.ignore_index;
        let checked = check_targets(&self.targets, num_classes, ignore_index);
        if size(dims) <= LONGEST {
            let is_valid = !is_absurd(dims) && self.targets.dtype().is_int();
            let aims = if is_valid { self.aims(num_classes, ignore_index)? } else { None };
            check(checked, aims.is_some());
        }
        Ok(Some(()))
    }
}
