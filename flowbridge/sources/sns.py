"""AWS SNS: alarms of CloudWatch (JSON inside of the JSON), other messages, and the questions around a subscription.

A subscription is confirmed by opening a link. We never open it: a room shows it, so that a person decides.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from flowbridge.sources.reading import at, mapping, moment, objects, parsed, text
from flowbridge.sources.report import FIRING, RESOLVED, report, words
from flowbridge.sources.source import Headers, Incoming, Notice, Source, State, UnrecognisedError
from flowbridge.sources.summary import summary

_TYPE, _ID = "x-amz-sns-message-type", "x-amz-sns-message-id"
_STATES: dict[str, tuple[str, State]] = {"ALARM": (FIRING, "firing"), "OK": (RESOLVED, "resolved")}
_REGION = re.compile(r"arn:aws:[a-z0-9-]+:([a-z0-9-]{1,40}):")
_OPERATORS = {
    "GreaterThanOrEqualToThreshold": "≥",
    "GreaterThanThreshold": ">",
    "LessThanOrEqualToThreshold": "≤",
    "LessThanThreshold": "<",
}


def recognises(headers: Headers, payload: Any) -> bool:
    return _TYPE in headers or {"Type", "MessageId", "TopicArn"} <= mapping(payload).keys()


def read(incoming: Incoming) -> Sequence[Notice]:
    payload = incoming.payload
    if incoming.headers.get("x-amz-sns-rawdelivery") == "true":
        topic = incoming.headers.get("x-amz-sns-topic-arn", "")
        return [_notification(payload if isinstance(payload, str | dict | list) else text(payload), topic, "", None)]
    kind = text(payload, "Type") or incoming.headers.get(_TYPE, "")
    topic = text(payload, "TopicArn")
    if kind in ("SubscriptionConfirmation", "UnsubscribeConfirmation"):
        return [_subscription(kind, topic, text(payload, "SubscribeURL"))]
    if "Message" not in mapping(payload):
        raise UnrecognisedError("it has no message")
    message = payload["Message"]
    return [_notification(message, topic, text(payload, "Subject"), at(payload, "Timestamp"))]


def _subscription(kind: str, topic: str, url: str) -> Notice:
    if kind == "SubscriptionConfirmation":
        title, link = "AWS SNS: confirm the subscription?", "Confirm the subscription"
        what = (
            f"Messages of the topic {topic} will come here once this link is opened. Leave it if nobody expects them."
        )
    else:
        title, link = "AWS SNS: the subscription has ended", "Subscribe again"
        what = f"Messages of the topic {topic} come here no more."
    return Notice(kind, {"report": report(title, text=what, links=[(link, url)])})


def _notification(message: Any, topic: str, subject: str, time: Any) -> Notice:
    found = parsed(message)
    if text(found, "AlarmName") and text(found, "NewStateValue"):
        return _alarm(found, topic)
    name = topic.rpartition(":")[2]
    title = subject or name or "AWS SNS"
    facts = [("topic", name if subject else "")]
    if isinstance(found, dict | list):
        return Notice(
            "Notification", {"report": report(title, facts=facts, since=time, began="at"), "details": summary(found)}
        )
    return Notice("Notification", {"report": report(title, text=text(found), facts=facts, since=time, began="at")})


def _alarm(alarm: Any, topic: str) -> Notice:
    value = text(alarm, "NewStateValue")
    mark, state = _STATES.get(value, ("", ""))
    name, arn, time = text(alarm, "AlarmName"), text(alarm, "AlarmArn"), at(alarm, "StateChangeTime")
    trigger = mapping(alarm, "Trigger")
    return Notice(
        value,
        {
            "report": report(
                name,
                mark=mark,
                outcome=value.replace("_", " ").lower() if value != "OK" else "ok",
                text="\n".join(filter(None, (text(alarm, "AlarmDescription"), text(alarm, "NewStateReason")))),
                facts=[
                    ("region", text(alarm, "Region")),
                    ("account", text(alarm, "AWSAccountId")),
                    ("metric", " ".join(filter(None, (text(trigger, "Namespace"), text(trigger, "MetricName"))))),
                    *((text(one, "name"), text(one, "value")) for one in objects(trigger, "Dimensions")),
                    ("alarm when", _condition(trigger)),
                ],
                since=time if state != "resolved" else None,
                until=time if state == "resolved" else None,
                links=[("CloudWatch", _console(arn or topic, name))],
            )
        },
        key=f"alarm:{arn or name}",
        state=state,
        firing=("",) if state == "firing" else (),
        time=moment(time),
    )


def _condition(trigger: Mapping[str, Any]) -> str:
    """`average ≥ 0.0 for 1 period of 86400 s`."""
    operator, threshold = _OPERATORS.get(text(trigger, "ComparisonOperator")), text(trigger, "Threshold")
    if operator is None or not threshold:
        return ""
    periods, seconds = text(trigger, "EvaluationPeriods"), text(trigger, "Period")
    long = f" for {periods} {'period' if periods == '1' else 'periods'} of {seconds} s" if periods and seconds else ""
    return f"{text(trigger, 'Statistic').lower() or 'value'} {operator} {threshold}{long}"


def _console(arn: str, name: str) -> str:
    region = _REGION.match(arn)
    if region is None:
        return ""
    base = f"https://{region[1]}.console.aws.amazon.com/cloudwatch/home?region={region[1]}"
    return f"{base}#alarmsV2:alarm/{quote(name, safe='', errors='replace')}"


def delivery_id(headers: Headers, payload: Any) -> str:
    return text(payload, "MessageId") or headers.get(_ID, "")


SOURCE = Source(
    "sns",
    "AWS SNS",
    recognises,
    read,
    words,
    delivery_id=delivery_id,
    sample={
        "Type": "Notification",
        "MessageId": "e288882d-4281-5be4-8fde-dccc11c8cb01",
        "TopicArn": "arn:aws:sns:eu-west-1:123456789012:alarms",
        "Subject": 'ALARM: "shop errors" in EU (Ireland)',
        "Message": json.dumps(
            {
                "AlarmName": "shop errors",
                "AlarmDescription": "The shop answers with errors",
                "AWSAccountId": "123456789012",
                "AlarmArn": "arn:aws:cloudwatch:eu-west-1:123456789012:alarm:shop errors",
                "NewStateValue": "ALARM",
                "NewStateReason": "Threshold Crossed: 1 datapoint [17.0] was greater than the threshold (10.0).",
                "StateChangeTime": "2026-11-30T23:53:45.093+0000",
                "Region": "EU (Ireland)",
                "OldStateValue": "OK",
                "Trigger": {
                    "MetricName": "HTTPCode_Target_5XX_Count",
                    "Namespace": "AWS/ApplicationELB",
                    "Statistic": "SUM",
                    "Dimensions": [{"value": "app/shop/50dc6c495c0c9188", "name": "LoadBalancer"}],
                    "Period": 60,
                    "EvaluationPeriods": 1,
                    "ComparisonOperator": "GreaterThanThreshold",
                    "Threshold": 10.0,
                },
            }
        ),
        "Timestamp": "2026-11-30T23:53:45.134Z",
        "SignatureVersion": "1",
        "Signature": "EXAMPLE",
        "SigningCertURL": "https://sns.eu-west-1.amazonaws.com/SimpleNotificationService-example.pem",
        "UnsubscribeURL": "https://sns.eu-west-1.amazonaws.com/?Action=Unsubscribe&SubscriptionArn=example",
    },
    sample_headers={
        "User-Agent": "Amazon Simple Notification Service Agent",
        "Content-Type": "text/plain; charset=UTF-8",
        "x-amz-sns-message-type": "Notification",
        "x-amz-sns-message-id": "e288882d-4281-5be4-8fde-dccc11c8cb01",
        "x-amz-sns-topic-arn": "arn:aws:sns:eu-west-1:123456789012:alarms",
    },
)
