//! Threads that stand for the processes of a split vocabulary.

use super::on_device;
use candle_core::{Result, Tensor, bail};
use candle_label_smoothing::Shard;
use std::cell::Cell;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

/// One of several processes, with a channel to and from each.
pub struct Process {
    pub rank: usize,
    to: Vec<Sender<Tensor>>,
    from: Vec<Receiver<Tensor>>,
    pub num_exchanges: Cell<usize>,
}

impl Process {
    /// Stacks the tensors of all processes. It is an error if one of them does not take part.
    pub fn gather(&self, tensor: &Tensor) -> Result<Tensor> {
        self.num_exchanges.set(self.num_exchanges.get() + 1);
        // The threads of a GPU test have a stream each.
        tensor.device().synchronize()?;
        for process in &self.to {
            // A process that has ended needs no tensor.
            let _ = process.send(tensor.clone());
        }
        let mut tensors = Vec::new();
        for (rank, process) in self.from.iter().enumerate() {
            match process.recv_timeout(Duration::from_secs(60)) {
                Ok(tensor) => tensors.push(tensor),
                Err(error) => {
                    bail!("process {rank} sends nothing to process {}: {error}", self.rank)
                }
            }
        }
        Tensor::stack(&tensors, 0)
    }
}

/// Runs `f` on each of `count` processes, and returns their results in order.
pub fn run<T: Send>(count: usize, f: impl Fn(&Process) -> T + Sync) -> Vec<T> {
    let (mut to, mut from): (Vec<_>, Vec<_>) = (0..count).map(|_| (Vec::new(), Vec::new())).unzip();
    for to in &mut to {
        for from in &mut from {
            let (sender, receiver) = channel();
            to.push(sender);
            from.push(receiver);
        }
    }
    let processes = to.into_iter().zip(from).enumerate().map(|(rank, (to, from))| Process {
        rank,
        to,
        from,
        num_exchanges: Cell::new(0),
    });
    thread::scope(|scope| {
        let f = &f;
        let threads: Vec<_> = processes.map(|process| scope.spawn(move || f(&process))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no process panics")).collect()
    })
}

/// The first class of a process.
pub fn first_class(split: &[usize], rank: usize) -> usize {
    split[..rank].iter().sum()
}

pub fn shard(split: &[usize], rank: usize) -> Shard {
    Shard { first_class: first_class(split, rank), num_classes: split.iter().sum() }
}

/// The classes of a process, of a tensor whose dimension `dim` is the classes.
pub fn part(tensor: &Tensor, dim: usize, split: &[usize], rank: usize) -> Result<Tensor> {
    tensor.narrow(dim, first_class(split, rank), split[rank])
}

/// The class targets, or the process's part of probabilities.
pub fn targets_of(
    targets: &Tensor,
    class_dim: usize,
    split: &[usize],
    rank: usize,
) -> Result<Tensor> {
    match targets.dtype().is_int() {
        true => on_device(targets),
        false => on_device(&part(targets, class_dim, split, rank)?),
    }
}
