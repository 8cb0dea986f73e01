"""A run of many measurements: its clock, its record, and what fails or does not fit."""

import concurrent.futures
import threading
import time

from _record import nvidia_smi, write_json

# What a program takes to compile for each of its passes, until one has been compiled.
COMPILE_SECONDS_A_PASS = 10.0
MEASURE_SECONDS = 6.0


class Skipped(Exception):
    """Raised by what does not fit into the time that is left."""


class Session:
    """The clock, the record, and what keeps one failure from ending the rest."""

    def __init__(self, options):
        self.options = options
        self.start = time.perf_counter()
        self.lock = threading.Lock()  # programs are compiled in threads
        self.compile_seconds_a_pass = COMPILE_SECONDS_A_PASS
        self.record = {
            "options": vars(options),
            "nvidia_smi": nvidia_smi(),
            "pytorch": {},
            "peak": {},
            "steps": {},
            "agreement": {},
            "training": {},
            "ensemble": {},
            "targets": [],
            "skipped": [],
            "errors": {},
        }

    def left(self):
        return 60 * self.options.minutes - (time.perf_counter() - self.start)

    def say(self, text):
        print(f"[{time.perf_counter() - self.start:6.1f} s] {text}", flush=True)

    def save(self):
        with self.lock:
            self.record["elapsed_seconds"] = time.perf_counter() - self.start
            write_json(self.options.json, self.record)

    def attempt(self, name, seconds, function, *args):
        """function(*args), or None if it fails or does not fit."""
        try:
            if self.left() < seconds:
                raise Skipped(f"{seconds:.0f} s do not fit")
            return function(*args)
        except Skipped as reason:
            with self.lock:
                self.record["skipped"].append(f"{name}: {reason}")
            self.say(f"skipped {name}: {reason}")
        except Exception as error:
            # Out of memory, a compiler's error, a missing driver: all are results.
            message = f"{type(error).__name__}: {error}"[:1000]
            with self.lock:
                self.record["errors"][name] = message
            self.say(f"FAILED {name}: {message[:200]}")
        finally:
            self.save()
        return None


def compile_all(session, label, jobs):
    """Compiles in threads; returns name -> (run, cost) of those that work.

    Args:
      session: The session.
      label: What the jobs are part of.
      jobs: Name -> (passes in the program, 0 for a network so small or a time so well
        reserved that it always fits, function that gives compile_step's result).
    """

    def compile_one(name, passes, job):
        def run():
            needed = session.compile_seconds_a_pass * passes + MEASURE_SECONDS
            if session.left() < needed:
                raise Skipped(f"{needed:.0f} s do not fit")
            return job()

        return name, session.attempt(f"{label}: {name}", 0, run)

    ready = {}
    with concurrent.futures.ThreadPoolExecutor(session.options.threads) as pool:
        futures = [
            pool.submit(compile_one, name, passes, job)
            for name, (passes, job) in jobs.items()
        ]
        for future in concurrent.futures.as_completed(futures):
            name, result = future.result()
            if result is None:
                continue
            ready[name] = result
            seconds = result[1]["compile_seconds"]
            session.say(f"{label}: {name} compiled in {seconds:.1f} s")
            # Small programs have a cost of their own: what a large one takes is less.
            if passes := jobs[name][0]:
                session.compile_seconds_a_pass = max(
                    session.compile_seconds_a_pass, seconds / passes / 2
                )
    return {name: ready[name] for name in jobs if name in ready}
