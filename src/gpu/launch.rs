//! The launches of an operation: which kernel, on which buffers, with which parameters.

use super::kernel::{Buffer, GpuStorage, Grid, KernelKey, KernelVariant, Limits, Options};
use super::params::{Access, IntParams, KernelParams, Outputs, RowStrides, RowWeightsType, Saves};
use crate::error::{Error, Result};
use crate::formula::{
    CLASS_FIELDS, ClassParams, ClassTable, Divisor, ForwardOut, LossParams, METRIC_FIELDS,
    RowMetrics, SavedIn, result_dtype,
};
use crate::layout::{self, Operand, check_layout, inner_size, num_rows};
use candle_core::{DType, Layout, Storage, StorageRef, WithDType};

/// The number of rows up to which the saved states share the storage of the loss. This saves an allocation. Of more rows, a loss
/// that is kept or copied to the host would carry too much along.
const MAX_ROWS_WITH_LOSS: usize = 4096;

/// The number of states up to which one block merges those of all splits. More of them take a launch of their own.
const MAX_JOINED_STATES: usize = 1 << 14;

/// The inputs and parameters that the kernels of one operation share.
pub(super) struct Launch<'a, S: GpuStorage> {
    params: &'a LossParams,
    pub(super) device: S::Device,
    variant: KernelVariant,
    targets: &'a S,
    /// The class params, if they differ between classes.
    class_params: Option<StorageRef<'a>>,
    row_weights: Option<StorageRef<'a>>,
    pub(super) ints: IntParams,
    /// What the sum of the losses is divided by, if it is not the sum of the rows' weights.
    divisor: Option<f64>,
}

impl<'a, S: GpuStorage> Launch<'a, S> {
    pub(super) fn new(
        params: &'a LossParams,
        device: &S::Device,
        logits_dtype: DType,
        targets: Operand<'a, S>,
        num_rows: usize,
    ) -> Result<Self> {
        let targets_dtype = targets.0.dtype();
        let targets_class_dim = (!targets_dtype.is_int()).then_some(params.class_dim);
        let target_rows = match targets_class_dim {
            None => targets.1.shape().elem_count(),
            Some(class_dim) => layout::num_rows(targets.1.dims(), class_dim),
        };
        check_num_rows("targets", target_rows, num_rows)?;
        // The kernels count rows and classes in 32 bits, also some beyond the last.
        if num_rows > 0 && num_rows.max(params.num_classes) > 1 << 30 {
            let what = "logits with more than 2³⁰ rows or classes";
            return Err(Error::TooLarge { what, shape: vec![num_rows, params.num_classes] });
        }
        let mut ints = IntParams {
            targets: RowStrides::new(targets, targets_class_dim)?,
            num_rows: num_rows as u32,
            num_classes: params.num_classes as u32,
            first_class: params.first_class as u32,
            tile_classes: params.num_classes as u32,
            inner_size: 1,
            num_splits: 1,
            has_ignore_index: params.ignore_index.is_some().into(),
            ignore_index: params.ignore_index.unwrap_or(0),
            ..IntParams::default()
        };
        let class_params = match &params.class_table {
            ClassTable::Uniform(_) => None,
            ClassTable::PerClass(tensor) => Some(tensor.storage_and_layout().0),
        };
        let mut row_weights = None;
        if let Some(tensor) = &params.row_weights {
            let (storage, layout) = tensor.storage_and_layout();
            check_num_rows("row weights", layout.shape().elem_count(), num_rows)?;
            let weights = with_logits::<S>("row weights", &storage)?;
            ints.row_weights = RowStrides::new((weights, layout), None)?;
            ints.row_weights_type = RowWeightsType::new(weights.dtype())?;
            row_weights = Some(storage);
        }
        let per_class = class_params.is_some();
        Ok(Self {
            params,
            device: device.clone(),
            variant: KernelVariant {
                logits: logits_dtype,
                targets: targets_dtype,
                per_class,
                options: Options::new(params),
            },
            targets: targets.0,
            class_params,
            row_weights,
            ints,
            divisor: None,
        })
    }

    pub(super) fn over_logits(
        params: &'a LossParams,
        logits: Operand<S>,
        targets: Operand<'a, S>,
    ) -> Result<Self> {
        let dims = logits.1.dims();
        let num_rows = num_rows(dims, params.class_dim);
        let mut launch = Self::new(params, logits.0.device(), logits.0.dtype(), targets, num_rows)?;
        launch.ints.logits = RowStrides::new(logits, Some(params.class_dim))?;
        launch.ints.tile_classes = dims.get(params.class_dim).map_or(0, |&len| len as u32);
        if launch.variant.targets.is_float() && targets.1.dims() != dims {
            let shape = targets.1.dims();
            return Err(internal_error(format!("the probabilities have shape {shape:?}")));
        }
        Ok(launch)
    }

    pub(super) fn for_backward(
        params: &'a LossParams,
        logits: Operand<S>,
        [targets, grad_output, (saved, layout)]: [Operand<'a, S>; 3],
        divisor: Option<Divisor<usize>>,
    ) -> Result<Self> {
        let mut launch = Self::over_logits(params, logits, targets)?;
        check_num_rows("output gradients", grad_output.1.shape().elem_count(), launch.num_rows())?;
        // A broadcast gradient has one element for all rows.
        launch.check_numbers("output gradients", grad_output.0, launch.num_rows().min(1))?;
        launch.ints.grad_output = RowStrides::new(grad_output, None)?;
        launch.ints.inner_size = inner_size(logits.1.dims(), params.class_dim) as u32;
        check_layout(layout, saved.len())?;
        let num_fields = params.num_saved_fields();
        if layout.stride() != [1, num_fields] {
            return Err(internal_error(format!("the saved states have the layout {layout:?}")));
        }
        let saved_rows = layout.shape().elem_count() / num_fields;
        check_num_rows("saved states", saved_rows, launch.num_rows())?;
        launch.ints.saved_start = layout.start_offset() as u64;
        launch.set_divisor(divisor);
        let mut min_len = 0;
        if let Some(Divisor::WeightSum(index)) = divisor {
            launch.ints.divisor_start = index as u32;
            min_len = index + 1;
        }
        launch.check_numbers("saved numbers", saved, min_len)?;
        Ok(launch)
    }

    fn set_divisor<I>(&mut self, divisor: Option<Divisor<I>>) {
        match divisor {
            None => {}
            Some(Divisor::Number(number)) => self.divisor = Some(number),
            Some(Divisor::WeightSum(_)) => self.ints.weighted = 1,
        }
    }

    fn num_rows(&self) -> usize {
        self.ints.num_rows as usize
    }

    /// The dtype of the arithmetic.
    fn dtype(&self) -> DType {
        result_dtype(self.variant.logits)
    }

    pub(super) fn alloc(&self, len: usize) -> Result<S> {
        Ok(S::alloc(&self.device, len, self.dtype())?)
    }

    fn kernel(&self, name: &'static str) -> KernelKey {
        KernelKey { name, variant: self.variant }
    }

    /// The buffers of the targets, the class params and the row weights.
    pub(super) fn shared_buffers(&self) -> Result<[Buffer<'_, S>; 3]> {
        let class_params = match &self.class_params {
            None => Buffer::Unused,
            Some(storage) => {
                let class_params = with_logits("class params", storage)?;
                let len = CLASS_FIELDS * self.ints.num_classes as usize;
                self.check_numbers("class params", class_params, len)?;
                Buffer::Input(class_params)
            }
        };
        let row_weights = match &self.row_weights {
            None => Buffer::Unused,
            Some(storage) => Buffer::Input(with_logits("row weights", storage)?),
        };
        Ok([Buffer::Input(self.targets), class_params, row_weights])
    }

    /// Checks a buffer that kernels index without its layout: it is in the dtype of the arithmetic and has at least
    /// `len` elements.
    fn check_numbers(&self, what: &str, storage: &S, len: usize) -> Result<()> {
        let (dtype, found_dtype, found_len) = (self.dtype(), storage.dtype(), storage.len());
        if found_dtype == dtype && found_len >= len {
            return Ok(());
        }
        let expected = format!("expected {len} in {dtype:?}");
        Err(internal_error(format!("{found_len} {what} in {found_dtype:?} were given, {expected}")))
    }

    /// Checks a contiguous tensor (`num_fields`, N).
    pub(super) fn check_fields(
        &self,
        what: &str,
        tensor: Operand<S>,
        num_fields: usize,
    ) -> Result<()> {
        check_contiguous(what, tensor)?;
        self.check_numbers(what, tensor.0, num_fields * self.num_rows())
    }

    pub(super) fn limits(&self, kernel: &'static str) -> Result<Limits> {
        Ok(S::limits(&self.device, self.kernel(kernel))?)
    }

    /// How the kernels read the logits. `allows_packs` says whether a kernel for packs could do the work.
    fn access(&self, allows_packs: bool, rows_are_adjacent: bool) -> Access {
        let IntParams { logits, targets, .. } = &self.ints;
        let adjacent_classes = logits.class_stride == 1
            && (self.variant.targets.is_int() || targets.class_stride == 1);
        match (allows_packs && adjacent_classes, rows_are_adjacent) {
            (true, _) => Access::Packs,
            (false, true) => Access::Rows,
            (false, false) => Access::Classes,
        }
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// As for [`GpuStorage::launch`].
    pub(super) unsafe fn run(
        &self,
        name: &'static str,
        grid: Grid,
        buffers: &mut [Buffer<S>],
    ) -> Result<()> {
        let kernel = self.kernel(name);
        // SAFETY: the caller vouches for the buffers. The parameters have the type of the arithmetic that
        // the kernel is compiled for.
        unsafe {
            match self.dtype() {
                DType::F64 => {
                    S::launch(&self.device, kernel, grid, buffers, &self.kernel_params::<f64>())?
                }
                _ => S::launch(&self.device, kernel, grid, buffers, &self.kernel_params::<f32>())?,
            }
        }
        Ok(())
    }

    fn kernel_params<A: WithDType>(&self) -> KernelParams<A> {
        let class_params = match self.params.class_table {
            ClassTable::Uniform(class_params) => class_params,
            // The kernel reads the table, except for the weight of a target out of range.
            ClassTable::PerClass(_) => ClassParams::from_fields([1.; CLASS_FIELDS]),
        };
        KernelParams::new(self.ints, class_params, self.params, self.divisor)
    }

    /// Computes the outputs of all rows from the logits. If rows are split, their splits are merged.
    pub(super) fn forward_rows(&mut self, logits: &S, mut outputs: Outputs<S>) -> Result<()> {
        if self.num_rows() == 0 {
            // There are no states to read, so any buffer will do.
            return self.merge_states(self.targets, 0, outputs);
        }
        // The kernel for packs adds the difference of the label's r to that of other classes. If it were negative, an
        // infinite logit would give ∞ − ∞.
        let label_is_below = self.variant.targets.is_int() && self.params.label_is_below;
        let access = self.access(!label_is_below, self.ints.logits.rows_are_adjacent());
        let kernel = if access == Access::Packs { "forward" } else { "forward_strided" };
        let limits = self.limits(kernel)?;
        let grid = self.ints.plan_launch(limits, self.variant.logits, access);
        let num_splits = self.ints.num_splits as usize;
        let joins_blocks = limits.joins_blocks || grid.blocks == 1;
        let joins_splits = joins_blocks && num_splits * self.num_rows() <= MAX_JOINED_STATES;
        self.ints.joins_splits = joins_splits.into();
        let mut split_states = None;
        if num_splits > 1 {
            self.ints.plan_finish(limits, num_splits);
            let states_per_row = self.params.num_state_fields() * num_splits;
            split_states = Some(self.alloc(states_per_row * self.num_rows())?);
        }
        let [out, saved, metrics, predictions] = outputs.buffers();
        let [targets, class_params, row_weights] = self.shared_buffers()?;
        let mut buffers = [
            Buffer::Input(logits),
            targets,
            class_params,
            row_weights,
            Buffer::optional_output(split_states.as_mut()),
            out,
            saved,
            metrics,
            predictions,
            Buffer::Scratch,
        ];
        // SAFETY: these are the buffers of `forward`. The strides were checked against the storages of the
        // logits, the targets and the row weights, and the length of the class params. Each output has room for what the flags
        // name, and the states have room for each split of each row. The kernel compares a class target with the number of
        // classes before it indexes by it. The grid has at most `MAX_PARTIALS` blocks.
        unsafe { self.run(kernel, grid, &mut buffers)? };
        match split_states {
            Some(states) if !joins_splits => self.merge_states(&states, num_splits, outputs),
            None if !joins_blocks => self.end_reduction(grid, outputs),
            _ => Ok(()),
        }
    }

    /// Computes the outputs of all rows from `num_states` softmax states of each.
    pub(super) fn merge_states(
        &mut self,
        states: &S,
        num_states: usize,
        mut outputs: Outputs<S>,
    ) -> Result<()> {
        if self.num_rows() == 0 && self.ints.reduces == 0 {
            return Ok(());
        }
        let limits = self.limits("finish")?;
        let grid = self.ints.plan_finish(limits, num_states);
        let [out, saved, metrics, predictions] = outputs.buffers();
        let [targets, class_params, row_weights] = self.shared_buffers()?;
        let mut buffers = [
            targets,
            class_params,
            row_weights,
            Buffer::Input(states),
            out,
            saved,
            metrics,
            predictions,
            Buffer::Scratch,
        ];
        // SAFETY: these are the buffers of `finish`, in bounds as in `forward_rows`. The input has `num_states`
        // states for each row.
        unsafe { self.run("finish", grid, &mut buffers)? };
        match limits.joins_blocks || grid.blocks == 1 {
            true => Ok(()),
            false => self.end_reduction(grid, outputs),
        }
    }

    /// Reduces the partial sums of the blocks of a launch, if it reduces.
    fn end_reduction(&mut self, grid: Grid, mut outputs: Outputs<S>) -> Result<()> {
        if self.ints.reduces == 0 {
            return Ok(());
        }
        self.ints.num_partials = grid.blocks as u32;
        let [out, saved, ..] = outputs.buffers();
        let grid = Grid { blocks: 1, threads_per_block: self.limits("reduce")?.block_size() };
        // SAFETY: these are the buffers of `reduce`. The launch before has written the partial sums.
        unsafe { self.run("reduce", grid, &mut [out, saved, Buffer::Scratch]) }
    }

    /// Writes the gradient of the logits. Without `logits`, `grad_logits` holds them and they are overwritten.
    pub(super) fn write_gradient(
        &mut self,
        logits: Option<&S>,
        grad_output: &S,
        saved: &S,
        grad_logits: &mut S,
    ) -> Result<()> {
        if self.num_rows() == 0 {
            return Ok(());
        }
        let rows_are_adjacent = self.ints.inner_size > 1;
        let access = self.access(!rows_are_adjacent, rows_are_adjacent);
        let kernel = if access == Access::Packs { "backward" } else { "backward_strided" };
        let limits = self.limits(kernel)?;
        let grid = self.ints.plan_launch(limits, self.variant.logits, access);
        self.ints.in_place = logits.is_none().into();
        let [targets, class_params, row_weights] = self.shared_buffers()?;
        let mut buffers = [
            Buffer::optional_input(logits),
            targets,
            class_params,
            row_weights,
            Buffer::Input(grad_output),
            Buffer::Input(saved),
            Buffer::Output(grad_logits),
        ];
        // SAFETY: these are the buffers of `backward`. The logits, targets, class params and row weights are in bounds as
        // in `forward_rows`. The strides of the output gradient were checked against its storage, and the
        // length of the saved states. The gradient has an element for each logit.
        unsafe { self.run(kernel, grid, &mut buffers) }
    }

    /// The losses that `compute` writes for the rows, or their sum divided.
    pub(super) fn loss(
        mut self,
        compute: impl FnOnce(&mut Self, Outputs<S>) -> Result<()>,
    ) -> Result<ForwardOut<S>> {
        let num_rows = self.num_rows();
        let reduces = self.params.divisor.is_some();
        self.ints.reduces = reduces.into();
        let losses = if reduces { 1 } else { num_rows };
        let (wants_saved, with_loss) = (self.params.saves_state, num_rows <= MAX_ROWS_WITH_LOSS);
        // The divisor comes before the saved states, if there is one.
        let divisor_start = if with_loss { losses } else { 0 };
        let start = divisor_start + usize::from(reduces);
        let num_fields = self.params.num_saved_fields();
        let saved_end = start + num_fields * num_rows;
        self.set_divisor(self.params.divisor);
        let divisor = self.params.divisor.map(|divisor| match divisor {
            Divisor::Number(number) => Divisor::Number(number),
            Divisor::WeightSum(()) => Divisor::WeightSum(divisor_start),
        });
        let (saves, out_len, saved_len) = match (wants_saved, with_loss) {
            (false, _) => (Saves::Nothing, losses, None),
            (true, false) => (Saves::Apart, losses, Some(saved_end)),
            (true, true) => (Saves::WithLoss, saved_end, None),
        };
        let mut out = self.alloc(out_len)?;
        let mut saved = saved_len.map(|len| self.alloc(len)).transpose()?;
        self.ints.saves = saves;
        self.ints.saved_start = start as u64;
        self.ints.divisor_start = divisor_start as u32;
        let mut metrics = self.params.wants_metrics.then(|| self.alloc_metrics()).transpose()?;
        let outputs = Outputs { out: &mut out, saved: saved.as_mut(), metrics: metrics.as_mut() };
        compute(&mut self, outputs)?;
        // The numbers of a row are adjacent.
        let layout = Layout::new((num_fields, num_rows).into(), vec![1, num_fields], start);
        let saved = wants_saved.then_some(SavedIn { storage: saved, layout, divisor });
        Ok(ForwardOut { loss: out, saved, metrics })
    }

    fn alloc_metrics(&self) -> Result<RowMetrics<S>> {
        let predictions = S::alloc(&self.device, self.num_rows(), DType::U32)?;
        Ok(RowMetrics { values: self.alloc(METRIC_FIELDS * self.num_rows())?, predictions })
    }
}

/// The storage of a tensor of the loss, which is on the device of the logits.
fn with_logits<'a, S: GpuStorage>(what: &str, storage: &'a Storage) -> Result<&'a S> {
    S::from_storage(storage).ok_or_else(|| {
        let location = storage.device().location();
        internal_error(format!("the {what} are on {location:?}, not with the logits"))
    })
}

/// Checks that a tensor has the rows of the logits: the kernels index it by them.
fn check_num_rows(what: &str, found: usize, num_rows: usize) -> Result<()> {
    match found == num_rows {
        true => Ok(()),
        false => Err(internal_error(format!("{found} {what} were given for {num_rows} rows"))),
    }
}

/// Checks that a tensor is contiguous and begins at the start of its storage.
pub(super) fn check_contiguous<S: GpuStorage>(
    what: &str,
    (storage, layout): Operand<S>,
) -> Result<()> {
    match layout.contiguous_offsets() {
        Some((0, end)) if end <= storage.len() => Ok(()),
        _ => Err(internal_error(format!("the {what} are not contiguous"))),
    }
}

/// An error that only a mistake in this crate causes.
pub(super) fn internal_error(text: String) -> Error {
    candle_core::Error::Msg(text).into()
}
