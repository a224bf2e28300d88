# SPDX-License-Identifier: MIT
"""A training from its start to its end."""

import logging
import time
from contextlib import contextmanager
from functools import cached_property, partial

import torch

from common.errors import Interrupted
from util.configuration import global_batch
from util.distributed import distribute
from util.lr_sched import adjust_learning_rate
from util.misc import device_name, duration, environment, peak_memory
from util.optimization import StepRecord, optimizer_step
from util.program import OF_A_RANK
from util.run_directory import RunDirectory
from util.sampling import DROP_PATH_STREAM, Place
from util.stopping import Stopping
from util.training import check_alike
from util.tuning import settle_execution

log = logging.getLogger(__name__)


class Run:
    """One training: its configuration, ranks, model, data, output directory, and when it saves and stops.

    A program supplies what differs: `train_one_epoch` of its engine, `warm_up_loss`, `after_epoch`, and what `restored`
    and `extra_state` do for it. Every rank calls the same methods.

        with run.opened(record):
            run.train()

    config: of `util.configuration.settle`. training: Training. loader: yields this rank's micro-batches, with a
    MicroBatchSampler as its batch_sampler. identity: of `run_identity`. datasets: whose filled pixels are counted.
    """

    def __init__(self, config, ranks, training, loader, identity, datasets=()):
        self.config, self.ranks, self.training, self.loader = config, ranks, training, loader
        self.identity, self.datasets = identity, datasets
        self.sampler = loader.batch_sampler
        self.steps = self.sampler.steps  # optimizer steps of an epoch
        self.global_batch = global_batch(config, ranks)
        self.directory = RunDirectory(config.output_dir, ranks)
        self.model = training.model  # under DDP while it trains
        self.start = self.stopping = self.record = None

    # ---- Supplied by a program -------------------------------------------------------------------

    def train_one_epoch(self, epoch):
        """Trains for one epoch, or what is left of it. Returns `statistics`."""
        raise NotImplementedError

    def warm_up_loss(self, model):
        """The loss of `warm_up_images`, the same at each call; model may be under DDP."""
        raise NotImplementedError

    def after_epoch(self, epoch, statistics):
        """Saves the finished epoch, and whatever else belongs to its end."""
        raise NotImplementedError

    def restored(self, start):
        """Restores what `extra_state` saved."""

    def extra_state(self):
        """What else a checkpoint holds."""
        return {}

    # ---- The run ---------------------------------------------------------------------------------

    @contextmanager
    def opened(self, data):
        """Holds the output directory and restores what --resume names; within the block, signals wait for a save.

        data: what `check_data` returned, for run.json.
        """
        config, training = self.config, self.training
        flags = {f"--{name}": value for name, value in vars(config).items() if name not in OF_A_RANK}
        others = {name: value for name, value in self.identity.items() if name not in vars(config)}
        self.ranks.require_alike({**flags, **others})
        with self.directory as directory:
            directory.open(resume=bool(config.resume), overwrite=config.overwrite)
            with self.ranks.together():
                self.start = training.resume(config, self.identity, self.steps)
            check_alike(self.start, self.ranks, config.output_dir if config.resume == "auto" else config.resume)
            with self.ranks.together():
                self.restored(self.start)
            if self.start.source is None:
                log.info("%s", training.beginning)
            settle_execution(training, self.warm_up_loss, config, self.ranks, self.start)
            directory.begin(self.description(data), self.start, self.steps, config.log_dir, config.overwrite)
            with Stopping(config, self.ranks, training.checkpoint_bytes()) as self.stopping:
                yield self

    def train(self):
        """All epochs from the start to --stop_epoch."""
        self.model = distribute(self.training.model, self.ranks, self.warm_up_loss)
        vars(self).pop("warm_up_images", None)  # frees their memory
        if self.start.epoch >= self.config.stop_epoch:
            log.info("all %d epochs are already done", self.config.stop_epoch)
        for epoch in range(self.start.epoch, self.config.stop_epoch):
            statistics = self.train_one_epoch(epoch)
            self.after_epoch(epoch, statistics)

    def batches(self, epoch):
        """Yields (Place, micro-batch) of an epoch, from where the run stands, each of which goes through `step`.

        Sets the learning rate of every step, and seeds drop path by the place.
        """
        config, sampler = self.config, self.sampler
        progress = self.start.progress if epoch == self.start.epoch else None
        self.record = StepRecord(sampler, self.ranks, self.training.scaler.is_enabled(), progress)
        sampler.epoch, sampler.first_step = epoch, self.record.read
        self._clock = _Clock(sampler.first_step)
        # No step is left where a run was stopped in the evaluation that ends an epoch.
        batches = iter(self.loader) if sampler.first_step < self.steps else None
        for step in range(sampler.first_step, self.steps):
            self._lr = adjust_learning_rate(self.training.optimizer, epoch + step / self.steps, config)
            self._loss = torch.zeros((), device=self.ranks.device)  # mean of this rank's micro-batches
            for i in range(config.accum_iter):
                place = Place(epoch, step, i * self.ranks.world_size + self.ranks.rank)
                try:
                    batch = next(batches)
                except Interrupted:
                    self.stop_if_asked(Place(epoch, step))  # raises Stopped, as Interrupted follows a signal
                    raise
                torch.manual_seed(place.seed(config.seed, DROP_PATH_STREAM))
                if self.ranks.world_size > 1:  # DDP reduces gradients with the last micro-batch only
                    self.model.require_backward_grad_sync = i == config.accum_iter - 1
                yield place, batch

    def step(self, loss, place):
        """Backward pass of a micro-batch. With the last one of a step, the optimizer follows, and what is due after it.

        loss: scalar on the device. Raises TrainingError when a loss or gradient is not finite, Stopped when the run is
        to end.
        """
        config, scaler, done = self.config, self.training.scaler, place.step + 1
        scaler.scale(loss / config.accum_iter).backward()
        self._loss += loss.detach() / config.accum_iter
        if place.micro // self.ranks.world_size < config.accum_iter - 1:
            return
        norm = optimizer_step(self._parameters, self.training.optimizer, scaler, config.clip_grad)
        self.record.add(place.step, self._loss, norm)
        if done % config.log_freq == 0 or done == self.steps:
            self.record.collect(done)
            self._log_step(place.epoch, done)
        if done < self.steps:  # after the last step, `after_epoch` does this
            self.stop_if_asked(Place(place.epoch, done), steps=place.epoch * self.steps + done)

    def statistics(self):
        """Of the epoch: {"loss" (mean over steps and ranks), "lr", "grad_norm" (both of the last step),
        "samples_per_s"}."""
        last = self.sampler.epoch + (self.steps - 1) / self.steps
        return {
            "loss": sum(self.record.losses) / self.steps,
            "lr": adjust_learning_rate(self.training.optimizer, last, self.config),
            "grad_norm": self.record.grad_norm,
            "samples_per_s": round(self.global_batch * self._clock.rate(self.steps), 1),
        }

    def stop_if_asked(self, place, where=None, steps=None, saved=False):
        """Saves if that is due, and raises Stopped, on all ranks alike, if the run is to end. Called between two steps.

        place: the next step. where: the place in words, for the message (default: epoch and step). steps: number done
        since the run began; given where --save_every_steps counts. saved: whether the place is saved already.
        """
        where = where or f"epoch {place.epoch}, step {place.step}/{self.steps}"
        self.stopping.check(where, None if saved else partial(self.save, place), steps)

    def save(self, place, entry=None, names=(), **more):
        """Saves a checkpoint at a place: what comes before it is done.

        entry: the line of log.txt, at the end of an epoch. names: of further files for the checkpoint. more: further
        entries of the checkpoint's dict.
        """
        progress = None
        if place.step:
            self.record.collect(place.step)
            progress = self.record.progress()
        state = self.training.state(place.epoch - 1, self.config, self.identity, self.filled(), progress)
        self.directory.save({**state, **self.extra_state(), **more}, entry, names)

    def finish_epoch(self, epoch, entry, names=(), **more):
        """Saves the finished epoch with its line of log.txt; arguments as in `save`."""
        self.stopping.timed(partial(self.save, Place(epoch + 1), entry, names, **more))

    def filled(self):
        """No-data and non-finite pixels filled so far, by the preparation of batches or by datasets, on all ranks."""
        own = sum(dataset.nonfinite.value for dataset in self.datasets if hasattr(dataset, "nonfinite"))
        return self.training.filled_before + sum(self.ranks.gather(int(self.training.prepare.filled) + own))

    def log_steps(self, samples, lr_given):
        """Logs what an epoch and a step are. lr_given: whether --lr was."""
        config = self.config
        rule = "--lr" if lr_given else f"blr {config.blr:g} × {self.global_batch}/256"
        log.info("%d samples of %s, split %s: %d steps an epoch", samples, config.dataset, config.split, self.steps)
        log.info(
            "global batch %d = %d images × %d micro-batches × %d ranks; lr %.4g (%s); %s, amp %s",
            self.global_batch,
            config.batch_size,
            config.accum_iter,
            self.ranks.world_size,
            config.lr,
            rule,
            device_name(self.ranks.device),
            config.amp,
        )

    def description(self, data):
        """What the run is, for run.json. data: what `check_data` returned, of one split or several."""
        return {
            "flags": vars(self.config),
            **environment(self.ranks),
            "data": data,
            "global_batch": self.global_batch,
            "execution": self.training.execution,
            "n_parameters": self.training.num_parameters(),
            "initialised_from": self.training.origin,
        }

    @cached_property
    def warm_up_images(self):
        """A random batch of the shapes of training, (B, 2, H, W) on the device."""
        size, generator = self.config.input_size, torch.Generator().manual_seed(self.config.seed)
        return torch.randn(self.config.batch_size, 2, size, size, generator=generator).to(self.ranks.device)

    @cached_property
    def _parameters(self):
        return [p for p in self.training.model.parameters() if p.requires_grad]

    def _log_step(self, epoch, done):
        """One line on the console, and TensorBoard scalars, about the steps since the last line."""
        config, writer = self.config, self.directory.writer
        loss = self.record.mean_loss((done - 1) % config.log_freq + 1)  # the same wherever the run was stopped
        left = (config.stop_epoch - epoch) * self.steps - done
        log.info(
            "Epoch [%d/%d] step %d/%d  loss %.4f  lr %.3e  grad %.3f  %.0f samples/s  ETA %s  memory %.2f GB",
            epoch,
            config.stop_epoch,
            done,
            self.steps,
            loss,
            self._lr,
            self.record.grad_norm,
            self.global_batch * self._clock.recent_rate(done),
            duration(left / self._clock.rate(done)),
            peak_memory(self.ranks.device) / 1e9,
        )
        if writer is not None:
            thousandths = int((epoch + done / self.steps) * 1000)  # of an epoch
            writer.add_scalar("train_loss", loss, thousandths)
            writer.add_scalar("lr", self._lr, thousandths)


class _Clock:
    """Steps per second, since the clock was made and since it was last asked."""

    def __init__(self, first):
        self.first, self.started = first, time.monotonic()
        self.last, self.asked = first, self.started

    def rate(self, done):
        return (done - self.first) / (time.monotonic() - self.started)

    def recent_rate(self, done):
        now = time.monotonic()
        rate = (done - self.last) / (now - self.asked)
        self.last, self.asked = done, now
        return rate
