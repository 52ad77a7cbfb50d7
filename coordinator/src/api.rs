//! The coordinator's HTTP API: how things stand, and what people ask for.
//!
//! Reading is open to who can reach the address (this machine, unless configured otherwise);
//! changing needs the token, where one is configured. A coordinator that stands by answers reads with
//! 503 and the name of who leads.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use alluvium_protocol::heartbeat::Heartbeat;
use alluvium_protocol::manifest::Repairs;
use alluvium_protocol::metrics::{CONTENT_TYPE, text};
use alluvium_protocol::task::RestoreTo;
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result};
use async_trait::async_trait;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use chrono::Utc;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use crate::asking::{Ask, Stand};
use crate::ledger::{Ledger, LedgerTable};
use crate::notify::{self, BODY_BYTES_MAX, Said};
use crate::requests::{Request, Requests, Verb, check_act};

/// How long the loop may take to answer; it may be listing a slow source.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long an act is watched before it is left to itself.
const ACT_TIMEOUT: Duration = Duration::from_secs(20);
/// Pause between two looks at an act.
const ACT_LOOK: Duration = Duration::from_millis(100);

/// The queue of messages that nobody understands.
pub const DEAD: &str = "dead";

/// What stands around the coordinator: other processes, queues.
#[async_trait]
pub trait Surroundings: Send + Sync {
    /// Living processes.
    async fn workers(&self) -> Result<Vec<Heartbeat>>;
    /// Each queue's name and how many messages nobody has in hand.
    async fn queues(&self) -> Result<Vec<(String, usize)>>;
    /// Err: work cannot go on as it should, and why.
    async fn ready(&self) -> Result<()>;
}

/// Who leads, and how to ask.
#[derive(Clone, Default)]
pub struct Lead(Arc<Mutex<Leading>>);

#[derive(Clone, Default)]
struct Leading {
    asks: Option<mpsc::Sender<Ask>>,
    other: Option<String>,
}

impl Lead {
    /// This process leads: its loop answers here.
    pub fn is_ours(&self, asks: mpsc::Sender<Ask>) {
        self.set(Leading { asks: Some(asks), other: None });
    }

    /// Somebody else leads, as far as is known.
    pub fn is_of(&self, other: Option<String>) {
        self.set(Leading { asks: None, other });
    }

    fn set(&self, leading: Leading) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = leading;
    }

    fn get(&self) -> Leading {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What the API needs.
#[derive(Clone)]
pub struct Api {
    /// Who leads.
    pub lead: Lead,
    /// The state folder, for ledger and requests.
    pub state: String,
    /// The configured pipelines.
    pub pipelines: Arc<Vec<Pipeline>>,
    /// Tells clusters apart: who asks may say whom it means.
    pub identity: String,
    /// What changes must show.
    pub token: Option<String>,
    /// Who may notify of new objects.
    pub notify: NotifyAccess,
    /// Other processes and queues.
    pub surroundings: Arc<dyn Surroundings>,
}

/// Who may notify of new objects.
#[derive(Clone, Default)]
pub struct NotifyAccess {
    /// What a webhook shows; `None`: it comes from this machine.
    pub token: Option<String>,
    /// Topics of SNS, whose messages are signed.
    pub topics: Arc<Vec<String>>,
}

/// The API's routes.
pub fn router(api: Api) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/metrics", get(|| async { ([(header::CONTENT_TYPE, CONTENT_TYPE)], text()) }))
        .route("/readyz", get(readyz))
        .route("/api/v1/status", get(status))
        .route("/api/v1/epochs", get(epochs))
        .route("/api/v1/plan", get(plan))
        .route("/api/v1/runs", get(runs))
        .route("/api/v1/audit", get(audit))
        .route("/api/v1/workers", get(workers))
        .route("/api/v1/queues", get(queues))
        .route("/api/v1/requests", post(ask_for))
        .route("/api/v1/notify", post(notified).layer(DefaultBodyLimit::max(BODY_BYTES_MAX)))
        .layer(middleware::from_fn_with_state(api.clone(), check_identity))
        .with_state(api)
}

/// Names the cluster that is meant.
pub const IDENTITY_HEADER: &str = "x-alluvium-cluster";

/// Tells a cluster from others that could answer at the same address.
pub fn identity(cluster: &str, state: &str) -> String {
    alluvium_protocol::pipeline::short_hash(format!("{cluster}\n{state}").as_bytes())
}

async fn check_identity(
    State(api): State<Api>,
    request: axum::extract::Request,
    next: middleware::Next,
) -> Response {
    let meant = request.headers().get(IDENTITY_HEADER);
    if meant.is_some_and(|meant| meant.as_bytes() != api.identity.as_bytes()) {
        let text =
            format!("the coordinator that answers here serves another cluster ({})", api.state);
        let error = Error::new(Code::CoordinatorUnreachable, text)
            .with_help("set another `listen` (or `api`) in [cluster]");
        return Failure(StatusCode::MISDIRECTED_REQUEST, error).into_response();
    }
    next.run(request).await
}

/// An error with its HTTP status.
struct Failure(StatusCode, Error);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match error.code {
            Code::UnknownPipeline | Code::UnknownEpoch => StatusCode::NOT_FOUND,
            Code::NotPossibleNow | Code::EpochSettled => StatusCode::CONFLICT,
            Code::CoordinatorUnreachable => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, error)
    }
}

type Answer = Result<Json<Value>, Failure>;

/// The envelope that `-o json` prints, too.
fn items(kind: &str, items: &[impl Serialize]) -> Answer {
    let items = items.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>();
    let items = items.map_err(Error::internal)?;
    Ok(Json(json!({ "schema": format!("alluvium.{kind}/v1"), "items": items })))
}

async fn readyz(State(api): State<Api>) -> Result<&'static str, Failure> {
    let unready = |error| Failure(StatusCode::SERVICE_UNAVAILABLE, error);
    api.surroundings.ready().await.map_err(unready)?;
    Ok(if api.lead.get().asks.is_some() { "leads\n" } else { "stands by\n" })
}

impl Api {
    fn asks(&self) -> Result<mpsc::Sender<Ask>> {
        let leading = self.lead.get();
        leading.asks.ok_or_else(|| {
            let other = leading.other.unwrap_or_else(|| "nobody yet".to_owned());
            let text = format!("this coordinator stands by; {other} leads");
            Error::new(Code::CoordinatorUnreachable, text)
        })
    }

    async fn stand(&self) -> Result<Stand> {
        let (reply, answer) = oneshot::channel();
        let silent = || Error::new(Code::CoordinatorUnreachable, "the coordinator is ending");
        self.asks()?.send(Ask::Stand(reply)).await.map_err(|_| silent())?;
        match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
            Ok(stand) => stand.map_err(|_| silent()),
            Err(_) => {
                let text = format!("the coordinator did not answer within {ANSWER_TIMEOUT:?}");
                Err(Error::new(Code::CoordinatorUnreachable, text))
            }
        }
    }

    async fn refusal(&self, id: &str) -> Result<Option<Error>> {
        let (reply, answer) = oneshot::channel();
        let silent = || Error::new(Code::CoordinatorUnreachable, "the coordinator is ending");
        let asked = self.asks()?.send(Ask::Refusal(id.to_owned(), reply)).await;
        asked.map_err(|_| silent())?;
        answer.await.map_err(|_| silent())
    }

    fn check_token(&self, headers: &HeaderMap) -> Result<(), Failure> {
        let Some(token) = &self.token else { return check_local(headers) };
        if is_shown(token, bearer(headers)) {
            return Ok(());
        }
        let error = Error::new(Code::NotPossibleNow, "changes need the token")
            .with_help("set `token` in [cluster] as the coordinator has it");
        Err(Failure(StatusCode::UNAUTHORIZED, error))
    }
}

fn bearer(headers: &HeaderMap) -> &str {
    let shown = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    shown.map(|text| text.strip_prefix("Bearer ").unwrap_or(text)).unwrap_or_default()
}

/// Hashes are compared: how long that takes says nothing about the token.
fn is_shown(token: &str, shown: &str) -> bool {
    let hash = |text: &str| alluvium_protocol::pipeline::full_hash(text.as_bytes());
    hash(shown) == hash(token)
}

#[derive(Deserialize)]
struct Shown {
    token: Option<String>,
}

/// Storage says that objects came. Nothing but the next listing depends on it.
async fn notified(
    State(api): State<Api>,
    Query(shown): Query<Shown>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    let refused = |status, error: Error| {
        tracing::warn!(%error, "a notification was refused");
        Failure(status, error)
    };
    let read = notify::read(&body, &api.notify.topics).await;
    let (said, is_signed) = read.map_err(|error| refused(StatusCode::BAD_REQUEST, error))?;
    if !is_signed {
        match &api.notify.token {
            Some(token) => {
                let shown = shown.token.as_deref().unwrap_or_else(|| bearer(&headers));
                if !is_shown(token, shown) {
                    let error = Error::new(Code::NotifyRefused, "notifications need the token")
                        .with_help(
                            "`Authorization: Bearer …` or `?token=…`, as `token` in [notify]",
                        );
                    return Err(refused(StatusCode::UNAUTHORIZED, error));
                }
            }
            None => check_local(&headers).map_err(|Failure(status, error)| {
                let help = "set `token` or `topics` in [notify] to be notified from elsewhere";
                let error = Error::new(Code::NotifyRefused, error.message).with_help(help);
                refused(status, error)
            })?,
        }
    }
    let woken: Vec<String> = match said {
        Said::Objects(objects) => {
            notify::woken(&api.pipelines, &objects).into_iter().map(str::to_owned).collect()
        }
        Said::Subscribe { url } => {
            let subscribed = notify::subscribe(&url).await;
            subscribed.map_err(|error| refused(StatusCode::BAD_GATEWAY, error))?;
            return Ok(Json(json!({ "subscribed": true })));
        }
        Said::Nothing => Vec::new(),
    };
    if !woken.is_empty() {
        // Who stands by answers 503: storage sends it again, sooner or later to the one that leads.
        let _ = api.asks()?.send(Ask::Wake(woken.clone())).await;
    }
    Ok(Json(json!({ "woken": woken })))
}

/// Without a token only this machine may change something: a page of another host, shown by a browser
/// here, may not.
fn check_local(headers: &HeaderMap) -> Result<(), Failure> {
    let is_local = |text: &str| {
        let host = text.split_once("://").map_or(text, |(_, rest)| rest);
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
        ["127.0.0.1", "[::1]", "localhost"].contains(&name)
    };
    for name in [header::HOST, header::ORIGIN] {
        let text = headers.get(&name).and_then(|value| value.to_str().ok());
        if text.is_some_and(|text| !is_local(text)) {
            let error = Error::new(Code::NotPossibleNow, format!("{name} is not this machine"))
                .with_help("set `token` in [cluster] to allow changes from elsewhere");
            return Err(Failure(StatusCode::FORBIDDEN, error));
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct Filter {
    pipeline: Option<String>,
    state: Option<String>,
    epoch: Option<i64>,
    limit: Option<usize>,
}

impl Filter {
    fn is_of(&self, pipeline: &str) -> bool {
        self.pipeline.as_deref().is_none_or(|wanted| wanted == pipeline)
    }
}

async fn status(State(api): State<Api>, Query(filter): Query<Filter>) -> Answer {
    let mut pipelines = api.stand().await?.pipelines;
    pipelines.retain(|standing| filter.is_of(&standing.pipeline));
    items("status", &pipelines)
}

async fn epochs(State(api): State<Api>, Query(filter): Query<Filter>) -> Answer {
    let mut epochs = api.stand().await?.epochs;
    epochs.retain(|epoch| {
        filter.is_of(&epoch.pipeline)
            && filter.state.as_ref().is_none_or(|state| *state == epoch.state)
    });
    items("epochs", &epochs)
}

async fn plan(State(api): State<Api>, Query(filter): Query<Filter>) -> Answer {
    let mut plan = api.stand().await?.plan;
    plan.retain(|item| filter.is_of(item["pipeline"].as_str().unwrap_or_default()));
    items("plan", &plan)
}

async fn runs(State(api): State<Api>, Query(filter): Query<Filter>) -> Answer {
    let limit = filter.limit.unwrap_or(50);
    let epoch = filter.epoch.and_then(Epoch::new);
    let rows = Ledger::open(&api.state).runs(filter.pipeline.as_deref(), epoch, limit).await?;
    items("runs", &rows)
}

async fn audit(State(api): State<Api>) -> Answer {
    items("audit", &Ledger::open(&api.state).audit().await?)
}

async fn workers(State(api): State<Api>) -> Answer {
    items("workers", &api.surroundings.workers().await?)
}

async fn queues(State(api): State<Api>) -> Answer {
    let queues = api.surroundings.queues().await?;
    let rows: Vec<Value> =
        queues.iter().map(|(name, waiting)| json!({"queue": name, "waiting": waiting})).collect();
    items("queues", &rows)
}

/// What is asked for over HTTP.
#[derive(Debug, Serialize, Deserialize)]
pub struct Asked {
    /// The verb.
    pub verb: Verb,
    /// The pipeline.
    pub pipeline: String,
    /// The epoch, where the verb concerns one.
    pub epoch: Option<Epoch>,
    /// The point, of a rollback.
    #[serde(default)]
    pub to: Option<RestoreTo>,
    /// Corrected rows, of a replay.
    #[serde(default, skip_serializing_if = "Repairs::is_empty")]
    pub repairs: Repairs,
    /// Who asks.
    pub by: String,
}

/// Keeps the request, records it, and watches it being carried out.
async fn ask_for(State(api): State<Api>, headers: HeaderMap, Json(asked): Json<Asked>) -> Answer {
    api.check_token(&headers)?;
    if !api.pipelines.iter().any(|pipeline| pipeline.id == asked.pipeline) {
        let text = format!("no pipeline has the name {:?}", asked.pipeline);
        return Err(Error::new(Code::UnknownPipeline, text).into());
    }
    if let Some(epoch) = asked.epoch {
        let mut epochs = api.stand().await?.epochs;
        epochs.retain(|found| found.pipeline == asked.pipeline);
        check_act(&asked.pipeline, &epochs, asked.verb, epoch)?;
    } else if asked.verb == Verb::Rollback && asked.to.is_none() {
        let text = "rollback needs `to`: {\"epoch\": E} or {\"version\": V}";
        return Err(Error::new(Code::NotPossibleNow, text).into());
    } else if !matches!(asked.verb, Verb::Pause | Verb::Resume | Verb::Rollback) {
        let text = format!("{} needs an epoch", asked.verb.as_str());
        return Err(Error::new(Code::UnknownEpoch, text).into());
    }
    let request = Request {
        id: Uuid::new_v4().to_string(),
        verb: asked.verb,
        pipeline: asked.pipeline,
        epoch: asked.epoch,
        to: asked.to,
        repairs: asked.repairs,
        by: asked.by,
        at: Utc::now(),
    };
    let requests = Requests::open(&api.state)?;
    requests.ask(&request).await?;
    record(&api.state, &request, "asked over HTTP").await?;
    let asks = api.asks()?;
    let _ = asks.send(Ask::Look).await;
    let deadline = tokio::time::Instant::now() + ACT_TIMEOUT;
    while requests.is_open(&request.id).await? {
        if tokio::time::Instant::now() > deadline {
            return Ok(Json(json!({ "request": request.id, "outcome": "asked" })));
        }
        tokio::time::sleep(ACT_LOOK).await;
    }
    match api.refusal(&request.id).await? {
        Some(error) => Err(error.into()),
        None => Ok(Json(json!({ "request": request.id, "outcome": "carried out" }))),
    }
}

/// Records a manual act in the ledger.
pub async fn record(state: &str, request: &Request, detail: &str) -> Result<()> {
    let row = json!({
        "at": request.at.to_rfc3339(),
        "by": request.by,
        "verb": request.verb.as_str(),
        "pipeline": request.pipeline,
        "epoch": request.epoch,
        "request": request.id,
        "detail": detail,
    });
    Ledger::open(state).append(LedgerTable::AuditLog, vec![row]).await
}
