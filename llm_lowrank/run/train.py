"""The loop: load, step, after. Everything that happens in a run happens here, in this order, by explicit calls."""

from __future__ import annotations

from functools import partial

import draccus
from torch import nn

from llm_lowrank.adapters.exchange import measure_exchange
from llm_lowrank.adapters.redirect import make_step
from llm_lowrank.data import MicroBatch, Stream
from llm_lowrank.engines import Engine
from llm_lowrank.models.source import Source
from llm_lowrank.run.ahead import Ahead
from llm_lowrank.run.build import codec
from llm_lowrank.run.calibration import calibrate, exchange
from llm_lowrank.run.deterministic import algorithms
from llm_lowrank.run.held_out import Evaluation, evaluate, training_loss
from llm_lowrank.run.load import load, load_best
from llm_lowrank.run.memory import compare, predict
from llm_lowrank.run.merging import export_adapter, merged_gaps
from llm_lowrank.run.messages import HOPELESS, describe_skipped_step, describe_stream, log_exchange, log_kept, opening
from llm_lowrank.run.meter import Meter, log_step, meter_of, progress_bar
from llm_lowrank.run.metrics import Metrics
from llm_lowrank.run.prepare import Run, agree_on_date, find_checkpoint, make_engine, prepare
from llm_lowrank.run.profiling import profiled
from llm_lowrank.run.recipe import Recipe
from llm_lowrank.run.report import log_start, merge_and_report
from llm_lowrank.run.saving import Saving
from llm_lowrank.run.signals import Preempted, Signals
from llm_lowrank.run.trained import Trained

SAMPLES = 5  # answers printed after training


def train(recipe: Recipe) -> Trained:
    """Train as the recipe says and write output_dir. Raise Preempted if a signal ended the run early. Collective."""
    with algorithms(recipe.deterministic):
        engine = make_engine(recipe)
        try:
            with Signals() as signals, engine.guard():
                source, trained = _train(recipe, engine, signals)
        except Preempted:
            engine.close()
            raise
        engine.close()  # merging reads and writes files only: no rank needs to wait for rank 0
    if engine.main:
        merge_and_report(recipe, source)
    return trained


def _train(recipe: Recipe, engine: Engine, signals: Signals) -> tuple[Source, Trained]:
    """Do everything but the merging; return where the model came from, and what to return. Collective."""
    engine.at("reading the data")
    date = agree_on_date(recipe, engine)
    with engine.together():
        run = prepare(recipe, engine, date)
    find_checkpoint(run)
    signals.check(engine)
    run.say(opening(run))
    with engine.together():
        predicted = predict(run)
    model, loaded = load(run, signals)
    with Metrics(recipe.output, recipe.report_to, engine.main, run.resume_step, draccus.encode(recipe)) as metrics:
        log_start(metrics, run, loaded, predicted)
        before = None
        if run.resume_from is None:
            engine.at("the evaluation before training")
            before = evaluate(run, model, 0, metrics)
            run.say(f"before training: {before}")
            calibrate(run, model)
        last = train_steps(run, model, metrics, signals)
        if run.best.metric:
            run.say(log_kept(metrics, run))
        if run.best.is_before(run.made):
            del model
            model, last = load_best(run), None
        evaluation = after(run, model, metrics, before, last)
        run.say(compare(engine, predicted, metrics, run.made))
    return run.source, Trained(recipe, run.made, run.best.step or run.made, before, evaluation)


# --- step -------------------------------------------------------------------------------------------------------------


def train_steps(run: Run, model: nn.Module, metrics: Metrics, signals: Signals) -> Evaluation | None:
    """Make every step that is left, with what follows a step: exchange, evaluation, report, checkpoint. Collective.

    Returns the evaluation after the last step, if there was one.
    """
    recipe, engine, total, best = run.recipe, run.engine, run.total_steps, run.best
    saving, meter = Saving(run, metrics), meter_of(run)
    skipped_in_a_row, evaluation = 0, None
    run.made = run.resume_step or 0
    steps = range(run.made + 1, run.made if best.exhausted else total + 1)
    with progress_bar(run) as bar, Ahead(run.batches, total, engine.device) as ahead:
        for step in profiled(run, steps):
            engine.at(f"step {step}")
            rates, norm, good = optimizer_step(run, model, step, ahead.step(step - 1), meter)
            skipped_in_a_row = 0 if good else skipped_in_a_row + 1
            if not good:
                run.skipped += 1
                if recipe.on_nan == "stop" or skipped_in_a_row == HOPELESS:
                    saving.finish()  # what was saved before this step is good
                run.say(describe_skipped_step(run, step, norm, in_a_row=skipped_in_a_row))
            if step in run.exchange_steps:
                engine.at(f"the exchange after step {step}")
                hook = partial(exchange, run, model, step)
                if (event := measure_exchange(engine, hook, recipe.method.changes_function)) is not None:
                    run.say(log_exchange(metrics, step, event))
            bar.update()
            run.made, evaluation, better = step, None, False
            due = recipe.eval_steps and step % recipe.eval_steps == 0
            if best.metric if step == total else due:  # the last state is evaluated later, unless it may be the best
                engine.at(f"the evaluation after step {step}")
                with meter.paused():
                    evaluation = evaluate(run, model, step, metrics)
                better = best.hear(engine, step, getattr(evaluation, recipe.metric_for_best_model))
                run.say(f"step {step}: {evaluation}{', the best so far' * better}")
            last = step == total or best.exhausted  # saved too, as the export can fail
            if step % recipe.logging_steps == 0 or last:
                log_step(run, metrics, meter, step, rate=recipe.method.logged_rate(rates), norm=norm, bar=bar)
            stop, writing = signals.anywhere(engine, saving=saving.busy)
            if not writing:
                saving.finish()
            if stop or (better and not last) or (recipe.save_steps and (last or step % recipe.save_steps == 0)):
                saving.begin(step)
            if stop and not last:
                saving.finish()
                raise Preempted(
                    f"stopped by a signal after step {step} of {total}; resume with --resume_from_checkpoint auto"
                )
            if last:
                break
    saving.finish()
    return evaluation


def optimizer_step(
    run: Run, model: nn.Module, step: int, micros: list[MicroBatch], meter: Meter
) -> tuple[list[float], float, bool]:
    """Make step `step`, from 1; return the rates, the gradient norm, and whether gradients were finite. Collective.

    Of gradients that are not finite the method sees nothing, and the engine changes no value and no moment.
    """
    recipe, engine, method, adapters = run.recipe, run.engine, run.recipe.method, run.adapters
    rates = method.rates(adapters, step - 1, run.total_steps, run.schedule.rate)
    for micro in micros:
        method.batch(adapters, step - 1, micro.samples)
        loss = training_loss(run, model, micro) / micro.tokens
        engine.backward(loss)
        meter.add(loss, micro)
    finite = recipe.on_nan == "stop" or engine.finite()  # with stop, the norm of the step says it without another sum
    if finite:
        method.observe(adapters, engine)
    else:
        method.discard(adapters)
    norm = make_step(engine, method, adapters, step - 1, rates, recipe.max_grad_norm)
    good = finite and norm < float("inf")
    meter.step(good)
    return rates, norm, good


# --- after ------------------------------------------------------------------------------------------------------------


def after(
    run: Run, model: nn.Module, metrics: Metrics, before: Evaluation | None, evaluation: Evaluation | None
) -> Evaluation:
    """Evaluate the trained model, export its adapter, measure what a merge would change. Collective.

    evaluation: that of this state, if it is known.
    """
    recipe, engine = run.recipe, run.engine
    if isinstance(run.corpus.train, Stream):
        run.say(describe_stream(run.corpus.train, dict(run.corpus.dropped)))
    engine.at("the evaluation after training")
    if evaluation is None:
        evaluation = evaluate(run, model, run.made, metrics, kept=run.best.is_before(run.made))
    for question, answer, expected, score in evaluation.samples[:SAMPLES]:
        run.say(f"  {question!r}\n    answered {answer!r}, expected {expected!r}, score {score:g}")
    run.say(f"before training: {before}\nafter training:  {evaluation}" if before else f"after training:  {evaluation}")
    engine.at("the export")
    run.say(f"adapter: {export_adapter(run)}")
    if not codec(recipe).writable:
        run.say(merged_gaps(run, model, metrics))
    return evaluation
