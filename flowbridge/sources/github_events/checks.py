"""GitHub: continuous integration, statuses and deployments.

Each run is a story: what runs and what is green only tells, a failure is news.
"""

from flowbridge.sources import code_hosts
from flowbridge.sources.code_hosts import (
    Fields,
    Line,
    Report,
    branch,
    checked,
    code,
    deployed,
    ending,
    fact,
    facts,
    first,
    first_line,
    in_order,
    joined,
    lasted,
    line,
    link,
    listed,
    name,
    number,
    quote,
    sentence,
    short,
    spoken,
)
from flowbridge.sources.github_events.common import Make, names, where, who
from flowbridge.sources.reading import mapping, moment, objects, text

_ACTIONS = "github-actions"  # the app whose checks are workflow jobs, which are reported, too


def workflow_run(payload: Fields, action: str) -> Report:
    run = mapping(payload, "workflow_run")
    outcome = text(run, "conclusion") if action == "completed" else action
    attempt = number(run, "run_attempt")
    title = first(name(run, "name"), name(payload, "workflow", "name"), "A workflow")
    lasting = lasted(_start(run), moment(run.get("updated_at"))) if action == "completed" else ""
    run_number = text(run, "run_number")[:20]
    report = checked(
        sentence(title),
        name(run, "head_branch"),
        lasting,
        link(f"run #{run_number}" if run_number else "details", text(run, "html_url")),
        outcome,
    )
    report.facts = facts(
        _head(mapping(run, "head_commit"), run, first(name(run, "triggering_actor", "login"), who(payload))),
        joined(_pulls(payload, run), fact("Attempt", str(attempt)) if attempt > 1 else []),
    )
    report.key = code_hosts.key("workflow_run", text(run, "id"))
    report.firing = (str(attempt),) if report.state == "firing" else ()  # the next attempt that fails is news
    report.time = in_order(moment(run.get("updated_at")), action == "completed")
    return report


def _pulls(payload: Fields, run: Fields) -> Line:
    home = text(payload, "repository", "html_url")
    numbers = [text(pull, "number")[:20] for pull in objects(run, "pull_requests")][: code_hosts.MAX_NAMES]
    pulls = [link(f"#{each}", f"{home}/pull/{each}") for each in numbers if each]
    return fact("Pull request" if len(pulls) == 1 else "Pull requests", *pulls)


def _start(run: Fields) -> int | None:
    return moment(run.get("run_started_at")) or moment(run.get("created_at"))


def _head(commit: Fields, run: Fields, by: str) -> Line:
    """`abc1234 Its message — its author`."""
    sha = first(short(run.get("head_sha")), short(commit.get("id")))
    said = first(first_line(commit, "message"), line(run, "display_title"))
    return code_hosts.commit(sha, said, by)


def workflow_job(payload: Fields, action: str) -> Report:
    job = mapping(payload, "workflow_job")
    workflow = name(job, "workflow_name")
    failed = [name(step, "name") for step in objects(job, "steps") if text(step, "conclusion") == "failure"]
    report = checked(
        sentence("Job", first(name(job, "name"), "(unnamed)"), workflow and f"of {workflow}"),
        name(job, "head_branch"),
        lasted(moment(job.get("started_at")), moment(job.get("completed_at"))),
        link("details", text(job, "html_url")),
        text(job, "conclusion") if action == "completed" else action,
    )
    report.facts = facts(fact("Failed step" if len(failed) == 1 else "Failed steps", listed(failed)))
    report.is_quiet = report.state != "firing"  # its run says it
    report.key = code_hosts.key("workflow_job", text(job, "id"))
    report.time = moment(job.get("completed_at")) or moment(job.get("started_at"))
    return report


def check_run(payload: Fields, action: str) -> Report:
    run = mapping(payload, "check_run")
    report = checked(
        sentence("Check", first(name(run, "name"), "(unnamed)")),
        name(run, "check_suite", "head_branch"),
        lasted(moment(run.get("started_at")), moment(run.get("completed_at"))),
        link("details", first(text(run, "html_url"), text(run, "details_url"))),
        text(run, "conclusion") if action == "completed" else action,
    )
    report.facts = facts(sentence(code(short(run.get("head_sha"))), line(run, "output", "title")))
    report.is_quiet |= action != "completed" or text(run, "app", "slug") == _ACTIONS
    report.key = code_hosts.key("check_run", text(run, "id"))
    report.time = moment(run.get("completed_at")) or moment(run.get("started_at"))
    return report


def check_suite(payload: Fields, action: str) -> Report:
    suite = mapping(payload, "check_suite")
    app = name(suite, "app", "name")
    report = checked(
        sentence("The check suite", app and f"of {app}"),
        name(suite, "head_branch"),
        "",
        link("details", ""),
        text(suite, "conclusion") if action == "completed" else action,
    )
    report.facts = facts(_head(mapping(suite, "head_commit"), suite, who(payload)))
    report.is_quiet |= action != "completed" or text(suite, "app", "slug") == _ACTIONS
    report.key = code_hosts.key("check_suite", text(suite, "id"))
    report.time = moment(suite.get("updated_at"))
    return report


def status(payload: Fields, action: str) -> Report:
    branches = names(payload, "branches")
    commit = mapping(payload, "commit")
    report = checked(
        sentence(first(name(payload, "context"), "A status")),
        branches[0] if branches else "",
        "",
        link("details", text(payload, "target_url")),
        text(payload, "state"),
    )
    author = first(name(commit, "author", "login"), name(commit, "commit", "author", "name"))
    message = link(first_line(commit, "commit", "message"), text(commit, "html_url"))
    report.facts = facts(
        sentence(line(payload, "description")),
        code_hosts.commit(short(payload.get("sha")), message, author),
    )
    report.key = code_hosts.key("status", where(payload), text(payload, "sha"), text(payload, "context"))
    report.time = moment(payload.get("updated_at"))
    return report


def deployment(payload: Fields, action: str) -> Report:
    thing, found = mapping(payload, "deployment"), mapping(payload, "deployment_status")
    state = text(found, "state")
    end = ending(state or "in_progress")
    site = text(found, "environment_url")
    return Report(
        deployed(
            code(branch(thing.get("ref"))[1]),
            state or "in_progress",
            first(name(thing, "environment"), name(found, "environment")),
            first(name(thing, "creator", "login"), who(payload)),
            link("details", first(text(found, "log_url"), text(found, "target_url"))),
        ),
        end.icon,
        facts=facts(
            sentence(code(short(thing.get("sha"))), line(found, "description") or line(thing, "description")),
            fact("Site", link(site, site)) if state == "success" and site else [],
        ),
        outcome=state,
        is_quiet=end.is_quiet,
        key=code_hosts.key("deployment", text(thing, "id")),
        state=end.state,
        time=moment(found.get("updated_at")) or moment(found.get("created_at")) or moment(thing.get("created_at")),
    )


def deployment_review(payload: Fields, action: str) -> Report:
    run = mapping(payload, "workflow_run")
    title = first(line(run, "name"), line(run, "display_title"), "A workflow")
    environment = first(name(payload, "environment"), *names(payload, "workflow_job_runs", key="environment"))
    verb = {"requested": "waits for approval", "approved": "was approved", "rejected": "was rejected"}
    person = who(payload) if action in ("approved", "rejected") else ""
    return Report(
        sentence(
            title,
            verb.get(action, spoken(action)),
            environment and f"to deploy to {environment}",
            person and f"by {person}",
            ":",
            link("details", text(run, "html_url")),
        ),
        {"requested": "✋", "approved": "👍", "rejected": "❌"}.get(action, ""),
        quote=quote(payload, "comment"),
    )


def page_build(payload: Fields, action: str) -> Report:
    build = mapping(payload, "build")
    state = text(build, "status")
    end = ending({"built": "success", "errored": "failure"}.get(state, state))
    verb = {"built": "were built", "errored": "could not be built"}.get(state, "are being built")
    return Report(
        sentence("The pages", verb),
        end.icon,
        facts=facts(sentence(code(short(build.get("commit"))), line(build, "error", "message"))),
        outcome=state,
        is_quiet=end.state != "firing",
        key=code_hosts.key("page_build", where(payload)),
        state=end.state,
        firing=(short(build.get("commit")),) if end.state == "firing" else (),
        time=moment(build.get("updated_at")),
    )


REPORTS: dict[str, Make] = {
    "check_run": check_run,
    "check_suite": check_suite,
    "deployment": deployment,
    "deployment_review": deployment_review,
    "deployment_status": deployment,
    "page_build": page_build,
    "status": status,
    "workflow_job": workflow_job,
    "workflow_run": workflow_run,
}
