"""GitHub: continuous integration, statuses and deployments.

Each run is a story: what runs and what is green only tells, a failure is news.
"""

from flowbridge.sources import code_hosts as hosts
from flowbridge.sources.github_events.common import Make, names, where, who
from flowbridge.sources.reading import mapping, moment, objects, text

_ACTIONS = "github-actions"  # the app whose checks are workflow jobs, which are reported, too


def workflow_run(payload: hosts.Fields, action: str) -> hosts.Report:
    run = mapping(payload, "workflow_run")
    outcome = text(run, "conclusion") if action == "completed" else action
    attempt = hosts.number(run, "run_attempt")
    title = hosts.first(hosts.name(run, "name"), hosts.name(payload, "workflow", "name"), "A workflow")
    lasting = hosts.lasted(_start(run), moment(run.get("updated_at"))) if action == "completed" else ""
    run_number = text(run, "run_number")[:20]
    report = hosts.checked(
        hosts.sentence(title),
        hosts.name(run, "head_branch"),
        lasting,
        hosts.link(f"run #{run_number}" if run_number else "details", text(run, "html_url")),
        outcome,
    )
    report.facts = hosts.facts(
        _head(
            mapping(run, "head_commit"), run, hosts.first(hosts.name(run, "triggering_actor", "login"), who(payload))
        ),
        hosts.joined(_pulls(payload, run), hosts.fact("Attempt", str(attempt)) if attempt > 1 else []),
    )
    report.key = hosts.key("workflow_run", text(run, "id"))
    report.firing = (str(attempt),) if report.state == "firing" else ()  # the next attempt that fails is news
    report.time = hosts.in_order(moment(run.get("updated_at")), action == "completed")
    return report


def _pulls(payload: hosts.Fields, run: hosts.Fields) -> hosts.Line:
    home = text(payload, "repository", "html_url")
    numbers = [text(pull, "number")[:20] for pull in objects(run, "pull_requests")][: hosts.MAX_NAMES]
    pulls = [hosts.link(f"#{each}", f"{home}/pull/{each}") for each in numbers if each]
    return hosts.fact("Pull request" if len(pulls) == 1 else "Pull requests", *pulls)


def _start(run: hosts.Fields) -> int | None:
    return moment(run.get("run_started_at")) or moment(run.get("created_at"))


def _head(commit: hosts.Fields, run: hosts.Fields, by: str) -> hosts.Line:
    """`abc1234 Its message — its author`."""
    sha = hosts.first(hosts.short(run.get("head_sha")), hosts.short(commit.get("id")))
    said = hosts.first(hosts.first_line(commit, "message"), hosts.line(run, "display_title"))
    return hosts.commit(sha, said, by)


def workflow_job(payload: hosts.Fields, action: str) -> hosts.Report:
    job = mapping(payload, "workflow_job")
    workflow = hosts.name(job, "workflow_name")
    failed = [hosts.name(step, "name") for step in objects(job, "steps") if text(step, "conclusion") == "failure"]
    report = hosts.checked(
        hosts.sentence("Job", hosts.first(hosts.name(job, "name"), "(unnamed)"), workflow and f"of {workflow}"),
        hosts.name(job, "head_branch"),
        hosts.lasted(moment(job.get("started_at")), moment(job.get("completed_at"))),
        hosts.link("details", text(job, "html_url")),
        text(job, "conclusion") if action == "completed" else action,
    )
    report.facts = hosts.facts(hosts.fact("Failed step" if len(failed) == 1 else "Failed steps", hosts.listed(failed)))
    report.is_quiet = report.state != "firing"  # its run says it
    report.key = hosts.key("workflow_job", text(job, "id"))
    report.time = moment(job.get("completed_at")) or moment(job.get("started_at"))
    return report


def check_run(payload: hosts.Fields, action: str) -> hosts.Report:
    run = mapping(payload, "check_run")
    report = hosts.checked(
        hosts.sentence("Check", hosts.first(hosts.name(run, "name"), "(unnamed)")),
        hosts.name(run, "check_suite", "head_branch"),
        hosts.lasted(moment(run.get("started_at")), moment(run.get("completed_at"))),
        hosts.link("details", hosts.first(text(run, "html_url"), text(run, "details_url"))),
        text(run, "conclusion") if action == "completed" else action,
    )
    report.facts = hosts.facts(
        hosts.sentence(hosts.code(hosts.short(run.get("head_sha"))), hosts.line(run, "output", "title"))
    )
    report.is_quiet |= action != "completed" or text(run, "app", "slug") == _ACTIONS
    report.key = hosts.key("check_run", text(run, "id"))
    report.time = moment(run.get("completed_at")) or moment(run.get("started_at"))
    return report


def check_suite(payload: hosts.Fields, action: str) -> hosts.Report:
    suite = mapping(payload, "check_suite")
    app = hosts.name(suite, "app", "name")
    report = hosts.checked(
        hosts.sentence("The check suite", app and f"of {app}"),
        hosts.name(suite, "head_branch"),
        "",
        hosts.link("details", ""),
        text(suite, "conclusion") if action == "completed" else action,
    )
    report.facts = hosts.facts(_head(mapping(suite, "head_commit"), suite, who(payload)))
    report.is_quiet |= action != "completed" or text(suite, "app", "slug") == _ACTIONS
    report.key = hosts.key("check_suite", text(suite, "id"))
    report.time = moment(suite.get("updated_at"))
    return report


def status(payload: hosts.Fields, action: str) -> hosts.Report:
    branches = names(payload, "branches")
    commit = mapping(payload, "commit")
    report = hosts.checked(
        hosts.sentence(hosts.first(hosts.name(payload, "context"), "A status")),
        branches[0] if branches else "",
        "",
        hosts.link("details", text(payload, "target_url")),
        text(payload, "state"),
    )
    author = hosts.first(hosts.name(commit, "author", "login"), hosts.name(commit, "commit", "author", "name"))
    message = hosts.link(hosts.first_line(commit, "commit", "message"), text(commit, "html_url"))
    report.facts = hosts.facts(
        hosts.sentence(hosts.line(payload, "description")),
        hosts.commit(hosts.short(payload.get("sha")), message, author),
    )
    report.key = hosts.key("status", where(payload), text(payload, "sha"), text(payload, "context"))
    report.time = moment(payload.get("updated_at"))
    return report


def deployment(payload: hosts.Fields, action: str) -> hosts.Report:
    thing, found = mapping(payload, "deployment"), mapping(payload, "deployment_status")
    state = text(found, "state")
    end = hosts.ending(state or "in_progress")
    site = text(found, "environment_url")
    return hosts.Report(
        hosts.deployed(
            hosts.code(hosts.branch(thing.get("ref"))[1]),
            state or "in_progress",
            hosts.first(hosts.name(thing, "environment"), hosts.name(found, "environment")),
            hosts.first(hosts.name(thing, "creator", "login"), who(payload)),
            hosts.link("details", hosts.first(text(found, "log_url"), text(found, "target_url"))),
        ),
        end.icon,
        facts=hosts.facts(
            hosts.sentence(
                hosts.code(hosts.short(thing.get("sha"))),
                hosts.line(found, "description") or hosts.line(thing, "description"),
            ),
            hosts.fact("Site", hosts.link(site, site)) if state == "success" and site else [],
        ),
        outcome=state,
        is_quiet=end.is_quiet,
        key=hosts.key("deployment", text(thing, "id")),
        state=end.state,
        time=moment(found.get("updated_at")) or moment(found.get("created_at")) or moment(thing.get("created_at")),
    )


def deployment_review(payload: hosts.Fields, action: str) -> hosts.Report:
    run = mapping(payload, "workflow_run")
    title = hosts.first(hosts.line(run, "name"), hosts.line(run, "display_title"), "A workflow")
    environment = hosts.first(
        hosts.name(payload, "environment"), *names(payload, "workflow_job_runs", key="environment")
    )
    verb = {"requested": "waits for approval", "approved": "was approved", "rejected": "was rejected"}
    person = who(payload) if action in ("approved", "rejected") else ""
    return hosts.Report(
        hosts.sentence(
            title,
            verb.get(action, hosts.spoken(action)),
            environment and f"to deploy to {environment}",
            person and f"by {person}",
            ":",
            hosts.link("details", text(run, "html_url")),
        ),
        {"requested": "✋", "approved": "👍", "rejected": "❌"}.get(action, ""),
        quote=hosts.quote(payload, "comment"),
    )


def page_build(payload: hosts.Fields, action: str) -> hosts.Report:
    build = mapping(payload, "build")
    state = text(build, "status")
    end = hosts.ending({"built": "success", "errored": "failure"}.get(state, state))
    verb = {"built": "were built", "errored": "could not be built"}.get(state, "are being built")
    return hosts.Report(
        hosts.sentence("The pages", verb),
        end.icon,
        facts=hosts.facts(
            hosts.sentence(hosts.code(hosts.short(build.get("commit"))), hosts.line(build, "error", "message"))
        ),
        outcome=state,
        is_quiet=end.state != "firing",
        key=hosts.key("page_build", where(payload)),
        state=end.state,
        firing=(hosts.short(build.get("commit")),) if end.state == "firing" else (),
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
