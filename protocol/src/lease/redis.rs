//! Leases and heartbeats in Redis. Losing them costs work done twice, nothing else.
//!
//! Each change is one script: atomic, and cheap to repeat when its reply was lost. All keys of a
//! cluster carry one hash tag, so that a clustered Redis keeps them together.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{FromRedisValue, Script};
use tokio::runtime::Handle;
use uuid::Uuid;

use super::{Claim, Leases};
use crate::heartbeat::Heartbeat;
use crate::{Code, Error, Result};

/// A slow Redis counts as one that is not there: leases only save work.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest pause between tries to connect.
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(2);
/// After a failure Redis is left alone so long.
const REST: Duration = Duration::from_secs(2);
/// A name nobody uses is free after so long.
const NAME_TTL: Duration = Duration::from_secs(60);
/// Deaths of a task nobody finished are forgotten after a day.
const DEATHS_TTL: Duration = Duration::from_secs(24 * 3600);

/// KEYS lease, fence, deaths · ARGV owner, ttl, take over (1 or 0), ttl of deaths.
/// Returns {1, fence, deaths} or {0, remaining, owner}.
const CLAIM: &str = r"
local holder = redis.call('HGET', KEYS[1], 'owner')
if holder == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  local deaths = tonumber(redis.call('GET', KEYS[3]) or '0')
  return {1, tonumber(redis.call('HGET', KEYS[1], 'fence')), deaths}
end
if holder then
  if ARGV[3] == '0' then
    return {0, redis.call('PTTL', KEYS[1]), holder}
  end
  redis.call('INCR', KEYS[3])
  redis.call('PEXPIRE', KEYS[3], ARGV[4])
end
local fence = redis.call('INCR', KEYS[2])
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'fence', fence)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {1, fence, tonumber(redis.call('GET', KEYS[3]) or '0')}
";

/// KEYS lease · ARGV owner, fence, ttl. Returns 1 when it is ours.
const RENEW: &str = r"
local held = redis.call('HMGET', KEYS[1], 'owner', 'fence')
if held[1] == ARGV[1] and held[2] == ARGV[2] then
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  return 1
end
return 0
";

/// KEYS lease, deaths · ARGV owner, fence.
const RELEASE: &str = r"
local held = redis.call('HMGET', KEYS[1], 'owner', 'fence')
if held[1] == ARGV[1] and held[2] == ARGV[2] then
  redis.call('DEL', KEYS[1], KEYS[2])
end
return 1
";

/// KEYS deaths.
const SURVIVED: &str = r"
if tonumber(redis.call('GET', KEYS[1]) or '0') > 0 then
  redis.call('DECR', KEYS[1])
end
return 1
";

/// KEYS set of names, then one heartbeat · ARGV name, heartbeat, ttl.
const BEAT: &str = r"
redis.call('SADD', KEYS[1], ARGV[1])
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
return 1
";

/// KEYS state · ARGV state, ttl. Returns whose state it is.
const BELONGS: &str = r"
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then
  return owner
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ARGV[1]
";

/// Leases and heartbeats of one cluster.
#[derive(Clone)]
pub struct RedisLeases {
    name: String,
    connection: ConnectionManager,
    runtime: Handle,
    /// After a failure nobody waits for Redis until then.
    resting_until: Arc<Mutex<Option<Instant>>>,
}

impl RedisLeases {
    /// Leases that connect when they are first used, and again whenever they must.
    pub fn new(url: &str, name: &str, runtime: Handle) -> Result<Self> {
        let invalid = |e: redis::RedisError| {
            let text = format!("cluster.redis is not a Redis URL: {e}");
            Error::new(Code::ConfigInvalid, text)
        };
        let client = redis::Client::open(url).map_err(invalid)?;
        let config = ConnectionManagerConfig::new()
            .set_response_timeout(Some(RESPONSE_TIMEOUT))
            .set_connection_timeout(Some(RESPONSE_TIMEOUT))
            .set_max_delay(RECONNECT_DELAY_MAX);
        // Its tasks belong to the runtime of the connections.
        let entered = runtime.enter();
        let connection =
            ConnectionManager::new_lazy_with_config(client, config).map_err(invalid)?;
        drop(entered);
        Ok(Self { name: name.to_owned(), connection, runtime, resting_until: Arc::default() })
    }

    fn key(&self, kind: &str, of: impl std::fmt::Display) -> String {
        format!("{{{}}}:{kind}:{of}", self.name)
    }

    /// Runs a script where the connection lives, within the time of one answer.
    async fn run<T: FromRedisValue + Send + 'static>(
        &self,
        doing: &'static str,
        script: &'static str,
        keys: Vec<String>,
        arguments: Vec<String>,
    ) -> Result<T> {
        if self.rests() {
            return Err(unavailable(doing, &"it did not answer a moment ago"));
        }
        let mut connection = self.connection.clone();
        let ran = self.runtime.spawn(async move {
            let script = prepared(script);
            let mut call = script.prepare_invoke();
            for key in keys {
                call.key(key);
            }
            for argument in arguments {
                call.arg(argument);
            }
            // While it connects anew the manager would make us wait longer.
            tokio::time::timeout(RESPONSE_TIMEOUT * 2, call.invoke_async(&mut connection)).await
        });
        let failed = match ran.await.map_err(Error::internal)? {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => unavailable(doing, &error),
            Err(_) => unavailable(doing, &"no answer in time"),
        };
        *self.resting_until.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Instant::now() + REST);
        Err(failed)
    }

    /// It failed a moment ago: work goes on without it instead of waiting again and again.
    fn rests(&self) -> bool {
        let until = *self.resting_until.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| until > Instant::now())
    }

    /// Redis answers.
    pub async fn check(&self) -> Result<()> {
        self.run::<i64>("ask", "return 1", Vec::new(), Vec::new()).await.map(drop)
    }

    /// Redis' own clock.
    pub async fn time(&self) -> Result<DateTime<Utc>> {
        let script = "return redis.call('TIME')";
        let (seconds, micros): (i64, u32) =
            self.run("ask for the time", script, Vec::new(), Vec::new()).await?;
        let at = DateTime::from_timestamp(seconds, micros.saturating_mul(1000));
        at.ok_or_else(|| unavailable("ask for the time", &"not a time"))
    }

    /// Tells how a process is; without another word for `ttl` it counts as gone.
    pub async fn beat(&self, heartbeat: &Heartbeat, ttl: Duration) -> Result<()> {
        let body = serde_json::to_string(heartbeat).map_err(Error::internal)?;
        let keys = vec![self.key("workers", "names"), self.key("worker", &heartbeat.name)];
        let arguments = vec![heartbeat.name.clone(), body, milliseconds(ttl)];
        self.run::<i64>("send a heartbeat", BEAT, keys, arguments).await.map(drop)
    }

    /// Takes its name off the list of the living.
    pub async fn gone(&self, name: &str) {
        let script = "return redis.call('DEL', KEYS[1])";
        let deleted = self.run::<i64>("leave", script, vec![self.key("worker", name)], Vec::new());
        if let Err(error) = deleted.await {
            tracing::debug!(%error, "a heartbeat was not taken back; it runs out");
        }
    }

    /// Whose this cluster's name is: of the state that its processes named last, for a minute.
    pub async fn belongs_to(&self, state: &str) -> Result<String> {
        let keys = vec![self.key("state", "uri")];
        let arguments = vec![state.to_owned(), milliseconds(NAME_TTL)];
        self.run("look whose the name is", BELONGS, keys, arguments).await
    }

    /// The last words of all processes that count as living.
    pub async fn beats(&self) -> Result<Vec<Heartbeat>> {
        let mut connection = self.connection.clone();
        let names_key = self.key("workers", "names");
        let of = |name: &String| self.key("worker", name);
        let asked = redis::Cmd::smembers(&names_key);
        let names: Vec<String> = self.ask(&asked, &mut connection).await?;
        let mut living = Vec::new();
        for name in names {
            let body: Option<String> =
                self.ask(&redis::Cmd::get(of(&name)), &mut connection).await?;
            match body.and_then(|body| serde_json::from_str(&body).ok()) {
                Some(heartbeat) => living.push(heartbeat),
                None => {
                    let gone = redis::Cmd::srem(&names_key, &name);
                    let _: i64 = self.ask(&gone, &mut connection).await?;
                }
            }
        }
        living.sort_by(|a: &Heartbeat, b| a.name.cmp(&b.name));
        Ok(living)
    }

    async fn ask<T: FromRedisValue>(
        &self,
        command: &redis::Cmd,
        connection: &mut ConnectionManager,
    ) -> Result<T> {
        let asked = command.query_async(connection);
        match tokio::time::timeout(RESPONSE_TIMEOUT * 2, asked).await {
            Ok(answer) => answer.map_err(|e| unavailable("read heartbeats", &e)),
            Err(_) => Err(unavailable("read heartbeats", &"no answer in time")),
        }
    }
}

#[async_trait]
impl Leases for RedisLeases {
    async fn claim(
        &self,
        task: Uuid,
        owner: &str,
        ttl: Duration,
        take_over: bool,
    ) -> Result<Claim> {
        let fence = self.key("fence", "last");
        let keys = vec![self.key("lease", task), fence, self.key("deaths", task)];
        let take_over = if take_over { "1" } else { "0" }.to_owned();
        let arguments =
            vec![owner.to_owned(), milliseconds(ttl), take_over, milliseconds(DEATHS_TTL)];
        let (is_held, number, rest): (i64, i64, redis::Value) =
            self.run("claim a lease", CLAIM, keys, arguments).await?;
        let number = u64::try_from(number).unwrap_or(0);
        let not_read = |e: redis::ParsingError| unavailable("claim a lease", &e);
        if is_held == 1 {
            let deaths = u32::from_redis_value(rest).map_err(not_read)?;
            return Ok(Claim::Held { fence: number, deaths });
        }
        let owner = String::from_redis_value(rest).map_err(not_read)?;
        Ok(Claim::Taken { owner, remaining: Duration::from_millis(number) })
    }

    async fn renew(&self, task: Uuid, owner: &str, fence: u64, ttl: Duration) -> Result<bool> {
        let keys = vec![self.key("lease", task)];
        let arguments = vec![owner.to_owned(), fence.to_string(), milliseconds(ttl)];
        let is_ours: i64 = self.run("renew a lease", RENEW, keys, arguments).await?;
        Ok(is_ours == 1)
    }

    async fn survived(&self, task: Uuid) -> Result<()> {
        let keys = vec![self.key("deaths", task)];
        self.run::<i64>("say that a worker lives", SURVIVED, keys, Vec::new()).await.map(drop)
    }

    async fn holder(&self, task: Uuid) -> Result<Option<String>> {
        let script = "return redis.call('HGET', KEYS[1], 'owner')";
        self.run("look at a lease", script, vec![self.key("lease", task)], Vec::new()).await
    }

    async fn release(&self, task: Uuid, owner: &str, fence: u64) -> Result<()> {
        let keys = vec![self.key("lease", task), self.key("deaths", task)];
        let arguments = vec![owner.to_owned(), fence.to_string()];
        self.run::<i64>("release a lease", RELEASE, keys, arguments).await.map(drop)
    }
}

/// A script with its hash, computed once.
fn prepared(text: &'static str) -> Arc<Script> {
    static SCRIPTS: OnceLock<Mutex<HashMap<&'static str, Arc<Script>>>> = OnceLock::new();
    let scripts = SCRIPTS.get_or_init(Mutex::default);
    let mut scripts = scripts.lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(scripts.entry(text).or_insert_with(|| Arc::new(Script::new(text))))
}

fn milliseconds(time: Duration) -> String {
    time.as_millis().to_string()
}

fn unavailable(doing: &str, why: &dyn std::fmt::Display) -> Error {
    Error::new(Code::LeasesUnavailable, format!("{doing} in Redis: {why}"))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::lease::contract::{self, Fixture};

    fn leases_at(url: &str) -> RedisLeases {
        RedisLeases::new(url, &format!("test-{}", Uuid::new_v4()), Handle::current()).unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn redis_keeps_the_contract() {
        let url = std::env::var("ALLUVIUM_TEST_REDIS")
            .expect("ALLUVIUM_TEST_REDIS is not set: `scripts/test rust` starts a Redis");
        contract::all(|| async {
            let leases = Arc::new(leases_at(&url));
            // A real one has the real clock: time passes by waiting.
            let pass = Box::new(|time| {
                tokio::task::block_in_place(|| {
                    tokio::runtime::Handle::current().block_on(tokio::time::sleep(time));
                });
            });
            Fixture { leases, pass }
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn heartbeats_are_there_until_they_are_too_old() {
        let url = std::env::var("ALLUVIUM_TEST_REDIS").expect("ALLUVIUM_TEST_REDIS");
        let leases = leases_at(&url);
        let heartbeat = Heartbeat {
            name: "w".to_owned(),
            role: "worker".to_owned(),
            host: "h".to_owned(),
            process: 1,
            version: "0".to_owned(),
            started_at: DateTime::UNIX_EPOCH,
            at: DateTime::UNIX_EPOCH,
            slots: 2,
            resting: None,
            tasks: Vec::new(),
            cpu: 0.5,
            memory_bytes: 1,
            disk_free_bytes: 2,
        };
        leases.beat(&heartbeat, Duration::from_millis(300)).await.unwrap();
        assert_eq!(leases.beats().await.unwrap(), [heartbeat]);
        tokio::time::sleep(Duration::from_millis(400)).await;
        assert_eq!(leases.beats().await.unwrap(), []);
    }

    #[tokio::test]
    async fn a_redis_that_is_not_there_is_an_error_in_time() {
        let leases = leases_at("redis://127.0.0.1:1/0");
        let began = std::time::Instant::now();
        let error =
            leases.claim(Uuid::new_v4(), "a", Duration::from_secs(1), false).await.unwrap_err();
        assert_eq!(error.code, Code::LeasesUnavailable);
        assert!(began.elapsed() < Duration::from_secs(10));
    }
}
