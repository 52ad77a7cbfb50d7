//! Where alerts go: log, webhook, Slack, Teams, PagerDuty, mail.
//!
//! Each delivery takes 10 seconds at most. Redirects are not followed, and addresses of the link (such
//! as a cloud's metadata service) are not called: a URL in a configuration must not open a way there.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use alluvium_protocol::{Code, Error, Result};
use chrono::Utc;
use hmac::{Hmac, Mac};
use lettre::message::{Mailbox, MultiPart, header};
use lettre::{AsyncSmtpTransport, AsyncTransport, Message, Tokio1Executor};
use reqwest::header::{CONTENT_TYPE, RETRY_AFTER};
use reqwest::{StatusCode, redirect};
use serde_json::Value;
use sha2::Sha256;

use super::{Event, Kind, render};

/// How long one delivery may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Where PagerDuty takes events.
const PAGER_DUTY: &str = "https://events.pagerduty.com/v2/enqueue";
/// An answer is shown so far.
const ANSWER_SHOWN: usize = 200;

/// How a sink takes alerts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SinkKind {
    /// The process's own log.
    Log,
    /// CloudEvents over HTTP, signed when there is a secret.
    Webhook,
    /// A Slack webhook.
    Slack,
    /// A Teams workflow.
    Teams,
    /// PagerDuty's Events API v2.
    PagerDuty,
    /// Mail over SMTP.
    Email,
}

/// One configured sink.
#[derive(Clone)]
pub struct Sink {
    /// Its name in the configuration.
    pub name: String,
    /// How it takes alerts.
    pub kind: SinkKind,
    /// Where: an HTTP URL, or `smtp(s)://user:password@host:port`.
    pub url: String,
    /// Signs webhooks; PagerDuty's routing key.
    pub key: Option<String>,
    /// Of mails.
    pub from: String,
    /// Of mails.
    pub to: Vec<String>,
    /// Only these kinds; empty: all.
    pub kinds: Vec<Kind>,
    /// Only these pipelines (and the cluster); empty: all.
    pub pipelines: Vec<String>,
}

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // URLs of webhooks are secrets, too.
        f.debug_struct("Sink").field("name", &self.name).field("kind", &self.kind).finish()
    }
}

/// What became of a delivery that was not taken.
#[derive(Debug)]
pub struct Refusal {
    /// What was said.
    pub error: Error,
    /// Not before this pause.
    pub after: Option<Duration>,
    /// Never again: the receiver is gone for good.
    pub is_final: bool,
    /// It is this message that the receiver does not want; it may take others.
    pub is_of_message: bool,
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self { error, after: None, is_final: false, is_of_message: false }
    }
}

impl Sink {
    /// The sink wants to hear of this.
    pub fn wants(&self, event: &Event) -> bool {
        let incident = &event.incident;
        let is_of = incident.pipeline.is_empty()
            || self.pipelines.is_empty()
            || self.pipelines.contains(&incident.pipeline);
        is_of && (self.kinds.is_empty() || self.kinds.contains(&incident.kind))
    }

    /// Events that go in one message; the others go one by one.
    pub fn groups(&self) -> bool {
        !matches!(self.kind, SinkKind::Webhook | SinkKind::PagerDuty)
    }

    /// Delivers events (one, unless it groups). Ok: what the receiver said.
    pub async fn send(&self, events: &[Event], source: &str) -> Result<String, Refusal> {
        let Some(first) = events.first() else { return Ok(String::new()) };
        match self.kind {
            SinkKind::Log => {
                for event in events {
                    let (title, lines) = (event.title(), render::lines(event).join("; "));
                    tracing::warn!(
                        alert = event.incident.kind.as_str(),
                        pipeline = event.incident.pipeline,
                        change = event.change.as_str(),
                        "{title}: {lines}"
                    );
                }
                Ok("written to the log".to_owned())
            }
            SinkKind::Webhook => {
                let body = render::cloud_event(first, source);
                self.post(body, "application/cloudevents+json", true).await
            }
            SinkKind::Slack => self.post(render::slack(events), "application/json", false).await,
            SinkKind::Teams => self.post(render::teams(events), "application/json", false).await,
            SinkKind::PagerDuty => {
                let key = self.key.clone().unwrap_or_default();
                let body = render::pager_duty(first, &key, source);
                self.post(body, "application/json", false).await
            }
            SinkKind::Email => self.mail(events, first).await,
        }
    }

    fn error(&self, text: impl std::fmt::Display) -> Error {
        Error::new(Code::AlertNotSent, format!("alert.{}: {text}", self.name))
            .with_help(format!("`alluvium alerts test {}` tries it", self.name))
    }

    async fn post(&self, body: Value, kind: &str, signs: bool) -> Result<String, Refusal> {
        let url = match (&self.kind, self.url.as_str()) {
            (SinkKind::PagerDuty, "") => PAGER_DUTY,
            (_, url) => url,
        };
        let bytes = serde_json::to_vec(&body).map_err(Error::internal)?;
        let client = client().map_err(|e| self.error(plain(&e)))?;
        let mut request = client.post(url).header(CONTENT_TYPE, kind);
        if let Some(key) = self.key.as_ref().filter(|_| signs) {
            let at = Utc::now().timestamp().to_string();
            request = request
                .header("x-alluvium-timestamp", &at)
                .header("x-alluvium-signature", format!("sha256={}", sign(key, &at, &bytes)));
        }
        let answer = request.body(bytes).send().await.map_err(|e| self.error(plain(&e)))?;
        let status = answer.status();
        let after = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        let after = after.and_then(|text| text.parse().ok()).map(Duration::from_secs);
        let said = shown(&answer.text().await.unwrap_or_default(), ANSWER_SHOWN);
        if status.is_success() {
            return Ok(format!("{status} {said}"));
        }
        let error = self.error(format!("the receiver answered {status} {said}"));
        let is_of_message = matches!(
            status,
            StatusCode::BAD_REQUEST
                | StatusCode::PAYLOAD_TOO_LARGE
                | StatusCode::UNSUPPORTED_MEDIA_TYPE
                | StatusCode::UNPROCESSABLE_ENTITY
        );
        Err(Refusal { error, after, is_final: status == StatusCode::GONE, is_of_message })
    }

    async fn mail(&self, events: &[Event], first: &Event) -> Result<String, Refusal> {
        let address = |text: &str| {
            text.parse::<Mailbox>().map_err(|e| self.error(format!("{text:?} is no address: {e}")))
        };
        let domain = self.from.rsplit_once('@').map_or("alluvium", |(_, domain)| domain);
        let domain = domain.trim_end_matches('>');
        let thread = format!("<{}@{domain}>", first.incident.id);
        let mut message = Message::builder()
            .from(address(&self.from)?)
            .subject(render::summary(events))
            .header(header::MessageId::from(format!("<{}@{domain}>", first.id)))
            .references(thread);
        for to in &self.to {
            message = message.to(address(to)?);
        }
        let body = MultiPart::alternative_plain_html(render::text(events), render::html(events));
        let message = message.multipart(body).map_err(|e| self.error(e))?;
        let transport = AsyncSmtpTransport::<Tokio1Executor>::from_url(&self.url)
            .map_err(|e| self.error(e))?
            .timeout(Some(TIMEOUT))
            .build();
        let sending = tokio::time::timeout(TIMEOUT, transport.send(message)).await;
        let sent = sending.map_err(|_| self.error("the mail server took too long"))?;
        let answer = sent.map_err(|e| Refusal {
            is_of_message: e.is_permanent(),
            ..Refusal::from(self.error(e))
        })?;
        Ok(format!("{} {}", answer.code(), answer.message().collect::<Vec<_>>().join(" ")))
    }
}

/// Without the URL: it is a secret.
fn plain(error: &reqwest::Error) -> String {
    let mut text =
        if error.is_timeout() { "no answer in time" } else { "cannot be reached" }.to_owned();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

/// `HMAC-SHA256(key, timestamp "." body)` in hex.
fn sign(key: &str, at: &str, body: &[u8]) -> String {
    // HMAC takes keys of every length.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key.as_bytes()) else { return String::new() };
    mac.update(at.as_bytes());
    mac.update(b".");
    mac.update(body);
    mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The beginning of what somebody else said, fit for one line of a log or a screen.
pub(crate) fn shown(text: &str, most: usize) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(most).map(plain).collect()
}

/// The client of every outgoing call: bounded, without redirects, never to addresses of the link.
pub(crate) fn client() -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder()
        .timeout(TIMEOUT)
        .redirect(redirect::Policy::none())
        .no_proxy()
        .dns_resolver(Arc::new(NotTheLink))
        .user_agent(concat!("alluvium/", env!("CARGO_PKG_VERSION")))
        .build()
}

/// An address that only this link has: metadata services of clouds live there.
pub fn is_of_link(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
            Some(ip) => ip.is_link_local(),
            None => ip.is_unicast_link_local(),
        },
    }
}

/// Resolves names, and leaves addresses of the link out.
struct NotTheLink;

impl reqwest::dns::Resolve for NotTheLink {
    fn resolve(&self, name: reqwest::dns::Name) -> reqwest::dns::Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let allowed: Vec<SocketAddr> = found.filter(|at| !is_of_link(at.ip())).collect();
            Ok(Box::new(allowed.into_iter()) as reqwest::dns::Addrs)
        })
    }
}

/// A mail server that can be used; Err says why not. A password never goes in the clear.
pub fn check_mail_url(text: &str) -> std::result::Result<(), String> {
    let url = url::Url::parse(text).map_err(|e| format!("not a URL: {e}"))?;
    AsyncSmtpTransport::<Tokio1Executor>::from_url(text).map_err(|e| e.to_string())?;
    let is_safe =
        url.scheme() == "smtps" || url.query_pairs().any(|(k, v)| k == "tls" && v == "required");
    if url.password().is_some() && !is_safe {
        return Err("a password needs smtps://, or `?tls=required`".to_owned());
    }
    Ok(())
}

/// An address of mail; Err says why it is none.
pub fn check_address(text: &str) -> std::result::Result<(), String> {
    text.parse::<Mailbox>().map(drop).map_err(|e| format!("{text:?} is no address: {e}"))
}

/// A URL that alerts and hooks may call; Err says why not.
pub fn check_url(text: &str) -> std::result::Result<(), String> {
    let url = url::Url::parse(text).map_err(|e| format!("not a URL: {e}"))?;
    let is_local = match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost",
        Some(url::Host::Ipv4(ip)) if is_of_link(ip.into()) => {
            return Err("an address of the link (a metadata service?) is not called".to_owned());
        }
        Some(url::Host::Ipv6(ip)) if is_of_link(ip.into()) => {
            return Err("an address of the link is not called".to_owned());
        }
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        None => return Err("a URL with a host".to_owned()),
    };
    match url.scheme() {
        "https" => Ok(()),
        "http" if is_local => Ok(()),
        "http" => Err("expected https://; plain http only goes to this machine".to_owned()),
        other => Err(format!("expected https://; found {other}://")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_stay_off_the_link_and_on_tls() {
        for good in ["https://hooks.example.com/x", "http://127.0.0.1:9/x", "http://localhost/x"] {
            assert_eq!(check_url(good), Ok(()), "{good}");
        }
        for bad in [
            "http://example.com/x",
            "https://169.254.169.254/latest",
            "http://[fe80::1]/x",
            "https://[::ffff:169.254.169.254]/",
            "ftp://example.com",
            "nonsense",
        ] {
            assert!(check_url(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_signature_is_the_standard_hmac() {
        // Computed with Python's hmac.
        let expected = "b8569b78799ff9e3cbff0fc2d63a33a2b57f3282abd07c37ae5e8e7d79a5f163";
        assert_eq!(sign("secret", "1700000000", b"{}"), expected);
    }
}
