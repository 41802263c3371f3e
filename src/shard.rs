//! The loss over a vocabulary that is split between several processes.
//!
//! Each process computes the softmax states of the rows over its own classes. One exchange gives all of them the states of all, and
//! each merges these in the same order. `backward` is that of the whole vocabulary, of the classes of the process.

use crate::autograd;
use crate::error::Result;
use crate::exchange::{Exchange, Shard};
use crate::formula::{LossParams, num_state_fields};
use crate::layout::{check_memory, row_shape};
use crate::linear::{self, Head, Tiling};
use crate::loss::{LabelSmoothingLoss, LogitsInfo, attach_backward};
use candle_core::Tensor;

impl LabelSmoothingLoss {
    /// The loss over a vocabulary that is split between several processes, from the logits of this process's classes.
    ///
    /// This is the vocabulary-parallel cross-entropy of [Megatron-LM](https://arxiv.org/abs/1909.08053), with the smoothing over all
    /// classes and not over those of a process. Each process calls this function with its own `logits`, of shape (.., n) for the n
    /// classes of its `shard`. n may be 0. Class targets count the classes of all processes, 0 to `num_classes` − 1, and are the same on
    /// all. Probabilities are those of the process's own classes, in the shape of the logits. Class weights and a prior have a number for
    /// each class of all processes. All options work.
    ///
    /// The loss is that of [`forward`](Self::forward) with the logits of all classes, up to rounding. It has the same bits on every
    /// process. `backward` exchanges nothing. The gradient is that of this process's logits.
    /// [The guide](crate::guide::several_devices#vocabulary-parallel) has the formula.
    ///
    /// `gather` is the one exchange, by MPI, NCCL or threads. It gets a contiguous tensor of shape (4, N) for N rows, or (10, N) with
    /// [`Smoothing::over_unmasked`](crate::Smoothing::over_unmasked). N is 1 if there are no rows. The numbers are f64 on the CPU. On a
    /// GPU they are f32, or f64 for f64 logits. It returns the tensors of all processes, stacked in the order of their shards, on the same
    /// device: (..) becomes (processes, ..). It is called once, and need not be `Send`. [The guide](crate::guide::several_devices) shows it
    /// for MPI and NCCL.
    ///
    /// All processes must make the same calls in the same order, with the same options. This function cannot see the arguments of the
    /// others. If shards overlap or leave a gap, or if targets or options differ, the loss is wrong and there is no error. If the numbers
    /// of rows differ, so do the sizes of the exchanged tensors, which MPI and NCCL do not allow.
    /// [`check_shards`](crate::check_shards) compares rows, targets and shards.
    ///
    /// ```
    /// use candle_core::{Device, Error, Tensor, Var};
    /// use candle_label_smoothing::{LabelSmoothingLoss, Shard, Smoothing};
    /// use std::sync::mpsc::{Receiver, Sender, channel};
    /// use std::thread;
    ///
    /// // Two threads stand for the processes. Each has two of four classes.
    /// let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    /// let logits = Tensor::new(&[[1f32, 2., 3., 4.], [4., 1., 0., 2.]], &Device::Cpu)?;
    /// let targets = Tensor::new(&[3u32, 0], &Device::Cpu)?;
    /// let process = |rank: usize, to_other: Sender<Tensor>, from_other: Receiver<Tensor>| {
    ///     let gather = |states: &Tensor| {
    ///         to_other.send(states.clone()).map_err(Error::wrap)?;
    ///         let other = from_other.recv().map_err(Error::wrap)?;
    ///         Tensor::stack(&if rank == 0 { [states, &other] } else { [&other, states] }, 0)
    ///     };
    ///     let shard = Shard { first_class: 2 * rank, num_classes: 4 };
    ///     let logits = Var::from_tensor(&logits.narrow(1, shard.first_class, 2)?)?;
    ///     let mean = loss.forward_shard(&logits, &targets, shard, gather)?;
    ///     mean.backward()?;
    ///     mean.to_scalar::<f32>()
    /// };
    /// let ((to_1, from_0), (to_0, from_1)) = (channel(), channel());
    /// let losses = thread::scope(|scope| {
    ///     let second = scope.spawn(|| process(1, to_0, from_0));
    ///     [process(0, to_1, from_1), second.join().unwrap()]
    /// });
    /// let whole = loss.forward(&logits, &targets)?.to_scalar::<f32>()?;
    /// for loss in losses {
    ///     assert!((loss? - whole).abs() < 1e-6);
    /// }
    /// # Ok::<(), candle_label_smoothing::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward), except that a process may have no classes; classes beyond `num_classes`; an error of `gather`,
    /// or a tensor from it of another dtype, on another device, or whose shape is not (processes, ..).
    ///
    /// The other processes do not wait in this exchange for a process with an error. If the error is found before the exchange, the process
    /// calls `gather` with NaN in place of its numbers, and then returns the error. The loss of the others is NaN. But if the memory for
    /// these numbers is refused, there is no exchange, and the others wait. They also wait for a process that panics or ends:
    /// [the guide](crate::guide::several_devices#errors) shows what to do.
    pub fn forward_shard(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        shard: Shard,
        gather: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Tensor> {
        let states = logits_states(self, logits, targets, shard);
        let class_dim = |tensor: &Tensor| self.class_dim(tensor.dims()).ok();
        let exchange = exchange_of_rows(self, logits, class_dim, targets);
        exchange_states(&exchange, states, gather, |(params, targets), states| {
            let row_shape = row_shape(logits.dims(), params.class_dim);
            let computed = autograd::finish(&params, logits.dtype(), states, row_shape, &targets)?;
            attach_backward(computed, params, logits, targets)
        })
    }

    /// [`forward_shard`](Self::forward_shard) of `logits = hidden · weightᵀ + bias`, from the rows of the weight and the bias of this
    /// process's classes.
    ///
    /// `hidden` (.., H) is the same on all processes. `weight` (n, H) and `bias` (n) are those of the n classes of `shard`. The
    /// rest is as in [`forward_linear`](Self::forward_linear) and in [`forward_shard`](Self::forward_shard).
    ///
    /// `backward` exchanges nothing. The gradients of `weight` and `bias` are complete. The gradient of `hidden` is **this process's
    /// share**: its sum over the processes is the gradient of the hidden states. So cut the graph at the hidden states, sum their gradient
    /// over the processes, and go on with the sum. [The guide](crate::guide::several_devices#a-training-step) has an example.
    ///
    /// # Errors
    /// Those of [`forward_linear`](Self::forward_linear) and of [`forward_shard`](Self::forward_shard), which also says what happens on the
    /// other processes.
    pub fn forward_linear_shard(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        targets: &Tensor,
        shard: Shard,
        gather: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Tensor> {
        let tiling = Tiling { tile: None, budget: self.logits_budget() };
        forward_linear_shard(self, Head { hidden, weight, bias }, targets, shard, tiling, gather)
    }
}

/// [`LabelSmoothingLoss::forward_linear_shard`].
pub(crate) fn forward_linear_shard(
    loss: &LabelSmoothingLoss,
    head: Head,
    targets: &Tensor,
    shard: Shard,
    tiling: Tiling,
    gather: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
) -> Result<Tensor> {
    let states = linear::head_states(loss, head, targets, Some(shard), tiling, false);
    let exchange =
        exchange_of_rows(loss, head.hidden, |tensor| tensor.rank().checked_sub(1), targets);
    exchange_states(&exchange, states, gather, |tiled, states| {
        Ok(linear::head_loss(tiled, head, states)?.0)
    })
}

/// Exchanges the states of the rows, and lets `finish` compute the loss from those of all processes.
fn exchange_states<T>(
    exchange: &Exchange,
    states: Result<(T, Tensor)>,
    gather: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
    finish: impl FnOnce(T, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    // Without rows, a number for each field is exchanged, so that an error of another process shows.
    let sent = states.and_then(|(local, states)| match states.elem_count() {
        0 => Ok(((local, Some(states)), exchange.zeros()?)),
        _ => Ok(((local, None), states)),
    });
    let ((local, no_states), gathered) = exchange.run(sent, gather)?;
    match no_states {
        None => finish(local, &gathered),
        Some(states) => {
            let loss = finish(local, &states.unsqueeze(0)?)?;
            let zero_or_nan = (gathered.detach().sum_all()? * 0.)?.to_dtype(loss.dtype())?;
            Ok(loss.broadcast_add(&zero_or_nan)?)
        }
    }
}

/// The softmax states of the rows over the classes of this process, with the parameters and the detached targets.
fn logits_states(
    loss: &LabelSmoothingLoss,
    logits: &Tensor,
    targets: &Tensor,
    shard: Shard,
) -> Result<((LossParams, Tensor), Tensor)> {
    let info = LogitsInfo { shard: Some(shard), ..LogitsInfo::of(logits) };
    let (params, targets) = loss.validate(&info, targets)?;
    let row_shape = row_shape(logits.dims(), params.class_dim);
    let num_rows: usize = row_shape.iter().product();
    let num_numbers = num_rows.saturating_mul(params.num_state_fields());
    check_memory("the softmax states of rows", &row_shape, num_numbers)?;
    let states = autograd::new_states(&params, num_rows, logits.dtype(), logits.device())?;
    autograd::merge_tile(&params, true, &states, logits, &targets)?;
    Ok(((params, targets), states))
}

/// The exchange of the rows' states. An error may have to take part in it, so the number of rows is that of the logits or hidden states,
/// or that of the targets if these have no class dimension.
fn exchange_of_rows<'a>(
    loss: &LabelSmoothingLoss,
    tensor: &'a Tensor,
    class_dim_of: impl Fn(&Tensor) -> Option<usize>,
    targets: &Tensor,
) -> Exchange<'a> {
    let (dims, class_dim) = match class_dim_of(tensor) {
        Some(class_dim) => (tensor.dims(), Some(class_dim)),
        None if targets.dtype().is_int() => (targets.dims(), None),
        None => (targets.dims(), class_dim_of(targets)),
    };
    let rows = dims.iter().enumerate().filter(|(dim, _)| Some(*dim) != class_dim);
    let num_rows = rows.fold(1, |product: usize, (_, &len)| product.saturating_mul(len));
    let shape = [num_state_fields(loss.needs_extras()), num_rows.max(1)];
    Exchange::new(&shape, tensor.dtype(), tensor.device())
}
